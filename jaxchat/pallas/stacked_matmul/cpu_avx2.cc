// x @ w.T for quantized weights on AVX2 (Haswell, Zen and later), which has no instruction for a dot product of bytes:
// "multiply unsigned by signed bytes, add neighbours" (maddubs) is exact in 16 bits as long as one side has 4.
//
// Few rows of x: reading the weights is what matters. Many rows: a register tile of weight rows. 4-bit codes are lifted
// to 0 .. 15 and meet activations of 8 bits in 16-bit sums; 8-bit codes and activations of 15 bits are 16-bit integers.
#include "cpu_common.h"

namespace jaxchat {
namespace {

constexpr int64_t kBlock = 256;           // columns that few rows take at a time
constexpr int64_t kSubs = kBlock / kSub;  // sub-groups in them: their scales fill a vector

__m256i LoadInts(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// ---------------------------------------------------------------- the order of columns

// 32 columns of 16 bits: the even ones, then the odd ones.
void SplitInts(const Quantized& x, __m256i* even, __m256i* odd) {
  const auto pick = [](Ints a, Ints b, auto which) {
    return Bits<__m256i>(_mm256_shuffle_ps(Bits<__m256>(a), Bits<__m256>(b), decltype(which)::value));
  };
  constexpr std::integral_constant<int, 0x88> kEven;
  constexpr std::integral_constant<int, 0xdd> kOdd;
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  *even = _mm256_permutevar8x32_epi32(
      _mm256_packs_epi32(pick(x.q[0], x.q[1], kEven), pick(x.q[2], x.q[3], kEven)), order);
  *odd = _mm256_permutevar8x32_epi32(
      _mm256_packs_epi32(pick(x.q[0], x.q[1], kOdd), pick(x.q[2], x.q[3], kOdd)), order);
}

// The even columns as bytes, then the odd ones: the order in which the nibbles of 16 bytes unpack.
__m256i EvenOdd(__m256i even, __m256i odd) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(even, odd), 0b11011000);
}

// The scales (or minimums) of a block: where they are plain and the block is whole, and anywhere, zero beyond the last.
inline __m256 PlainScales(const Groups& groups, int64_t row, int64_t block) {
  const void* from = groups.Plain(row, block * kSubs);
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

inline __m256 AnyScales(const Weights& w, const Groups& groups, int64_t row, int64_t block) {
  Floats eight{};
  for (int64_t i = 0; i < std::min(kSubs, w.cols / kSub - block * kSubs); ++i)
    eight[i] = groups.At(row, block * kSubs + i);
  return Bits<__m256>(eight);
}

// ---------------------------------------------------------------- a few rows of x

// One block of one row of x, in the order in which the codes meet it.
template <Kind kind>
struct Block;
template <>
struct alignas(32) Block<Kind::kInt4> {
  static constexpr int kBytes = 128;
  static constexpr int kMost = 8;
  int32_t q[4][2][kSubs];  // of each vector of codes the even and the odd columns, four together
  int32_t offset[kSubs];  // takes back the lift of the codes; like `scale` in the order of `Place`
  float scale[kSubs];
  float sum[kSubs];  // of the values, for affine weights
};
template <>
struct alignas(32) Block<Kind::kInt8> {
  static constexpr int kBytes = 256;
  static constexpr int kMost = 4;
  int16_t q[8][2][16];
  float scale[kSubs];
  float sum[kSubs];
};

// Which lane sums up sub-group s of 4-bit codes: vector v has 2 v and 2 v + 1, one in each half.
constexpr int64_t Place(int64_t s) { return s / 2 + s % 2 * 4; }

// Whether 4-bit codes are dealt: of every sub-group four bytes to each vector, so that the sums of the vectors add up
// lane by lane. Done once for all rows of x; folding the sums of vectors as they are is done for each.
constexpr bool Dealt(int64_t rows) { return rows > 4; }

void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t rows, Block<Kind::kInt4>* out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t s = 0; s < kSubs; ++s) {
      const int64_t start = b * kBlock + s * kSub;
      const Quantized sub = Quantize(x + start, w.inputs - start, 127);
      __m256i even, odd;
      SplitInts(sub, &even, &odd);
      const Ints fours = Bits<Ints>(EvenOdd(even, odd));
      for (int i = 0; i < 8; ++i) {
        const int64_t at = i % 4, half = i / 4;
        (Dealt(rows) ? out[b].q[at][half][Place(s)] : out[b].q[s / 2][half][s % 2 * 4 + at]) = fours[i];
      }
      out[b].offset[Place(s)] = w.mins ? 0 : -8 * sub.total;
      out[b].scale[Place(s)] = sub.scale;
      out[b].sum[s] = sub.sum;
    }
}

void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t, Block<Kind::kInt8>* out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t s = 0; s < kSubs; ++s) {
      const int64_t start = b * kBlock + s * kSub;
      const Quantized sub = Quantize(x + start, w.inputs - start, 32767);
      out[b].scale[s] = sub.scale;
      out[b].sum[s] = sub.sum;
      __m256i even, odd;
      SplitInts(sub, &even, &odd);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[b].q[s][0]), even);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[b].q[s][1]), odd);
    }
}

inline void Deal(const uint8_t* codes, __m256i* out) {
  __m256i raw[4];
  for (int v = 0; v < 4; ++v) raw[v] = LoadInts(codes + 32 * v);
  const __m256i a = _mm256_unpacklo_epi32(raw[0], raw[1]), b = _mm256_unpackhi_epi32(raw[0], raw[1]);
  const __m256i c = _mm256_unpacklo_epi32(raw[2], raw[3]), d = _mm256_unpackhi_epi32(raw[2], raw[3]);
  out[0] = _mm256_unpacklo_epi64(a, c);
  out[1] = _mm256_unpackhi_epi64(a, c);
  out[2] = _mm256_unpacklo_epi64(b, d);
  out[3] = _mm256_unpackhi_epi64(b, d);
}

// Adds the products of a block to M sums.
template <int M, bool kAffine>
inline void Step(const uint8_t* codes, __m256 scales, __m256 mins, const Block<Kind::kInt4>* x, int64_t stride,
                 __m256* acc) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i dealt[4], even[4], odd[4];
  if constexpr (Dealt(M)) Deal(codes, dealt);
  for (int v = 0; v < 4; ++v) {
    __m256i raw = Dealt(M) ? dealt[v] : LoadInts(codes + 32 * v);
    // Affine codes are unsigned as they are.
    if constexpr (!kAffine) raw = _mm256_xor_si256(raw, _mm256_set1_epi8(static_cast<char>(0x88)));
    even[v] = _mm256_and_si256(raw, nibble);
    odd[v] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
  }
  scales = _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));  // as `Place`
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto& block = x[m * stride];
    __m256i sum[4];  // in 16 bits, which hold half of a sub-group: 16 * 15 * 127
    for (int v = 0; v < 4; ++v)
      sum[v] = _mm256_add_epi16(_mm256_maddubs_epi16(even[v], LoadInts(block.q[v][0])),
                                _mm256_maddubs_epi16(odd[v], LoadInts(block.q[v][1])));
    __m256i pairs;  // of 16-bit sums of a sub-group
    if constexpr (Dealt(M)) {
      pairs = _mm256_add_epi16(_mm256_add_epi16(sum[0], sum[1]), _mm256_add_epi16(sum[2], sum[3]));
    } else {
      // Within the halves of the vectors: 8 sums of a sub-group become 4, then 2.
      for (int v = 0; v < 4; v += 2)
        sum[v / 2] = _mm256_add_epi16(_mm256_blend_epi32(sum[v], sum[v + 1], 0b11001100),
                                      _mm256_alignr_epi8(sum[v + 1], sum[v], 8));
      const __m256 a = _mm256_castsi256_ps(sum[0]), b = _mm256_castsi256_ps(sum[1]);
      pairs = _mm256_add_epi16(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                               _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
    }
    const __m256i total = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), LoadInts(block.offset));
    acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(scales, _mm256_load_ps(block.scale)), acc[m]);
    if constexpr (kAffine) acc[m] = _mm256_fmadd_ps(mins, _mm256_load_ps(block.sum), acc[m]);
  }
}

template <int M, bool kAffine>
inline void Step(const uint8_t* codes, __m256 scales, __m256 mins, const Block<Kind::kInt8>* x, int64_t stride,
                 __m256* acc) {
  alignas(32) float scale[M][kSubs];
  __m256 sum[M];
  for (int m = 0; m < M; ++m) {
    const auto& block = x[m * stride];
    _mm256_store_ps(scale[m], _mm256_mul_ps(scales, _mm256_load_ps(block.scale)));
    sum[m] = kAffine ? _mm256_mul_ps(mins, _mm256_load_ps(block.sum)) : _mm256_setzero_ps();
  }
  for (int v = 0; v < 8; ++v) {
    const __m256i raw = LoadInts(codes + 32 * v);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8), odd = _mm256_srai_epi16(raw, 8);
    for (int m = 0; m < M; ++m) {
      const auto& block = x[m * stride];
      const __m256i product = _mm256_add_epi32(_mm256_madd_epi16(even, LoadInts(block.q[v][0])),
                                               _mm256_madd_epi16(odd, LoadInts(block.q[v][1])));
      sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_set1_ps(scale[m][v]), sum[m]);
    }
  }
  for (int m = 0; m < M; ++m) acc[m] = _mm256_add_ps(acc[m], sum[m]);
}

template <Kind kind>
struct Few {
  using Block = jaxchat::Block<kind>;
  static constexpr int kMost = Block::kMost;

  static int64_t Blocks(const Weights& w) { return (w.cols + kBlock - 1) / kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t rows, Block* out) {
    PrepareRow(w, x, Blocks(w), rows, out);
  }

  template <int M, bool kAffine>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    constexpr int64_t kBytes = Block::kBytes;
    const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols, stride = Blocks(w);
    const auto* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    const int64_t whole = std::min(bytes / kBytes, to);
    const __m256 none = _mm256_setzero_ps();
    __m256 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = none;
    const auto step = [&](int64_t b, const uint8_t* at, __m256 scale, __m256 min) {
      Step<M, kAffine>(at, scale, min, x + b, stride, acc);
    };
    const auto any = [&](int64_t b, const uint8_t* at) {
      step(b, at, AnyScales(w, scales, row, b), kAffine ? AnyScales(w, mins, row, b) : none);
    };
    int64_t b = from;
    if (scales.plain())
      for (; b < whole; ++b) {
        Prefetch<kBytes>(codes + b * kBytes);
        step(b, codes + b * kBytes, PlainScales(scales, row, b), kAffine ? PlainScales(mins, row, b) : none);
      }
    for (; b < whole; ++b) any(b, codes + b * kBytes);
    if (whole < to) {
      uint8_t last[kBytes] = {};
      std::memcpy(last, codes + whole * kBytes, bytes - whole * kBytes);
      any(whole, last);
    }
    for (int m = 0; m < M; ++m) Put(Sum(Bits<Floats>(acc[m])), from, y + m * w.rows + row);
  }
};

// ---------------------------------------------------------------- many rows of x

// A tile is two vectors of eight weight rows wide. A lane has 32 bits of one row: four columns of 4-bit codes as bytes,
// or two columns of 8-bit codes as 16-bit integers.
constexpr int64_t kTileRows = 16;
template <Kind kind>
constexpr int kSteps = kind == Kind::kInt4 ? kSub / 4 : kSub / 2;  // in a sub-group
constexpr int64_t kPart = 2048;                                    // columns of a tile

// Prepared x, six rows at a time (those after the last are zero): [m / 6, steps, 6, 32 bits] in the order in which the
// tile has the columns, then [m / 6, cols / 32, 6] of what a sub-group needs beside them. Six rows' sums, two vectors
// of weights and two more fill the registers.
constexpr int64_t kRows = 6;
struct TiledX {
  int32_t* q;
  float* scale;
  float* sum;       // of the values, for affine weights
  int32_t* offset;  // takes back the lift of 4-bit codes, in 16 bits for each of the two pairs of columns in a lane
};

int Steps(const Weights& w) { return w.kind == Kind::kInt4 ? kSteps<Kind::kInt4> : kSteps<Kind::kInt8>; }

int64_t Padded(int64_t m) { return (m + kRows - 1) / kRows * kRows; }

int64_t TiledBytes(const Weights& w, int64_t m) { return Padded(m) * (w.cols / kSub) * (Steps(w) * 4 + 12); }

TiledX TiledView(const Weights& w, const void* prepared, int64_t m) {
  const int64_t count = Padded(m) * (w.cols / kSub);
  auto* q = static_cast<int32_t*>(const_cast<void*>(prepared));
  auto* scale = reinterpret_cast<float*>(q + count * Steps(w));
  return {q, scale, scale + count, reinterpret_cast<int32_t*>(scale + 2 * count)};
}

void TiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  const TiledX view = TiledView(w, out, m);
  const int64_t subs = w.cols / kSub;
  const int steps = Steps(w);
  for (int64_t i = begin; i < (end == m ? Padded(m) : end); ++i)
    for (int64_t s = 0; s < subs; ++s) {
      const float* from = x + i * w.inputs + s * kSub;
      const Quantized sub = Quantize(from, i < m ? w.inputs - s * kSub : 0, steps == kSub / 4 ? 127 : 32767);
      alignas(32) int32_t q[kSub / 2];
      int32_t offset = 0;
      if (w.kind == Kind::kInt4) {
        __m256i even, odd;
        SplitInts(sub, &even, &odd);
        _mm256_store_si256(reinterpret_cast<__m256i*>(q), EvenOdd(even, odd));
        // The sums of 16-bit lanes 0, 2, 4, ... and 1, 3, 5, ..., minus eight times.
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(w.mins ? 0 : 8), LoadInts(q));
        __m128i four = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b01001110));
        four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b10110001));
        offset = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), four));
      } else {
        for (int v = 0; v < 2; ++v) {
          const __m256i words = _mm256_packs_epi32(Bits<__m256i>(sub.q[2 * v]), Bits<__m256i>(sub.q[2 * v + 1]));
          _mm256_store_si256(reinterpret_cast<__m256i*>(q) + v, _mm256_permute4x64_epi64(words, 0b11011000));
        }
      }
      const int64_t at = i / kRows * subs + s, lane = i % kRows;
      for (int j = 0; j < steps; ++j) view.q[(at * steps + j) * kRows + lane] = q[j];
      view.scale[at * kRows + lane] = sub.scale;
      view.sum[at * kRows + lane] = sub.sum;
      view.offset[at * kRows + lane] = offset;
    }
}

// Part of a tile: codes [sub-group][step][vector][8 rows][32 bits], scales and minimums [sub-group][16 rows].
struct Tile {
  __m256i* codes;
  float* scale;
  float* min;
};

int64_t TiledScratchBytes(const Weights& w) { return kPart / kSub * (Steps(w) * 64 + kTileRows * 8); }

Tile TileView(const Weights& w, void* scratch) {
  auto* codes = static_cast<__m256i*>(scratch);
  auto* scale = reinterpret_cast<float*>(codes + kPart / kSub * Steps(w) * 2);
  return {codes, scale, scale + kPart / kSub * kTileRows};
}

// Eight by eight, of 32 bits.
inline void Transpose(__m256i* rows) {
  Floats floats[8];
  for (int i = 0; i < 8; ++i) floats[i] = Bits<Floats>(rows[i]);
  Transpose(floats);
  for (int i = 0; i < 8; ++i) rows[i] = Bits<__m256i>(floats[i]);
}

// Columns [from, to) of eight rows of weights, as vector v of the tile.
template <Kind kind>
void PackCodes(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int v, const Tile& tile) {
  constexpr int64_t kPerByte = kind == Kind::kInt4 ? 2 : 1, kColumns = 32 * kPerByte;  // of 32 bytes
  const __m256i nibble = _mm256_set1_epi8(15), lift = _mm256_set1_epi8(static_cast<char>(w.mins ? 0 : 0x88));
  const uint8_t* codes[8];
  for (int r = 0; r < 8; ++r) codes[r] = static_cast<const uint8_t*>(w.codes) + (rows[r] * w.cols + from) / kPerByte;
  __m256i* out = tile.codes + v;
  for (int64_t at = 0; at < (to - from) / kPerByte; at += 32, out += kColumns / kSub * kSteps<kind> * 2) {
    const bool half = at + 32 > (to - from) / kPerByte;
    __m256i raw[8];
    for (int r = 0; r < 8; ++r)
      raw[r] = half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + at)))
                    : LoadInts(codes[r] + at);
    Transpose(raw);
    for (int i = 0; i < (half ? 4 : 8); ++i) {
      if constexpr (kind == Kind::kInt4) {  // four of a sub-group, each two steps
        const __m256i lifted = _mm256_xor_si256(raw[i], lift);
        __m256i* step = out + (i / 4 * kSteps<kind> + i % 4) * 2;
        step[0] = _mm256_and_si256(lifted, nibble);
        step[8] = _mm256_and_si256(_mm256_srli_epi16(lifted, 4), nibble);
      } else {  // four columns: two steps. The bytes of a step go to the upper halves of 16 bits, then down.
        const auto widen = [&](int b) {
          const __m128i four = _mm_setr_epi8(-1, b, -1, b + 1, -1, b + 4, -1, b + 5, -1, b + 8, -1, b + 9, -1, b + 12,
                                             -1, b + 13);
          return _mm256_srai_epi16(_mm256_shuffle_epi8(raw[i], _mm256_broadcastsi128_si256(four)), 8);
        };
        out[4 * i] = widen(0);
        out[4 * i + 2] = widen(2);
      }
    }
  }
}

// The scales of eight rows from block `first` on, to out [sub-group][16].
void PackScales(const Weights& w, const Groups& scales, const int64_t* rows, int64_t first, int64_t subs, float* out) {
  for (int64_t b = 0; b * kSubs < subs; ++b) {
    const bool plain = scales.plain() && (b + 1) * kSubs <= subs;
    Floats eight[8];
    for (int r = 0; r < 8; ++r)
      eight[r] =
          Bits<Floats>(plain ? PlainScales(scales, rows[r], first + b) : AnyScales(w, scales, rows[r], first + b));
    Transpose(eight);
    for (int64_t s = b * kSubs; s < std::min(subs, (b + 1) * kSubs); ++s) Store(out + s * kTileRows, eight[s % kSubs]);
  }
}

template <Kind kind>
void Pack(const Weights& w, const Groups& scales, const Groups& mins, int64_t begin, int64_t from, int64_t to,
          const Tile& tile) {
  for (int v = 0; v < 2; ++v) {
    int64_t rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = std::min(begin + 8 * v + r, w.rows - 1);  // past the end: repeat the last
    PackCodes<kind>(w, rows, from, to, v, tile);
    PackScales(w, scales, rows, from / kBlock, (to - from) / kSub, tile.scale + 8 * v);
    if (w.mins) PackScales(w, mins, rows, from / kBlock, (to - from) / kSub, tile.min + 8 * v);
  }
}

// sum += a * b, pairs of bytes in 16 bits or pairs of 16 bits in 32. GCC would put off the additions of unrolled steps,
// and store what is to be added.
template <Kind kind>
inline void AddProducts(__m256i& sum, __m256i a, __m256i b) {
  if constexpr (kind == Kind::kInt4)
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(a, b)));
  else
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
}

// Columns [from, to) of kRows rows of x, the first a multiple of kRows, times a tile: added to y unless these are the
// first columns.
template <Kind kind, bool kAffine>
__attribute__((noinline)) void Multiply(const Weights& w, const TiledX& x, const Tile& tile, int64_t first, int64_t m,
                                        int64_t from, int64_t to, float* y, int64_t begin, int64_t end) {
  const int64_t at = first / kRows * (w.cols / kSub) + from / kSub;  // the first sub-group
  const __m256i* codes = tile.codes;
  const int32_t *q = x.q + at * kRows * kSteps<kind>, *offset = x.offset + at * kRows;
  const float *x_scale = x.scale + at * kRows, *x_sum = x.sum + at * kRows, *scales = tile.scale, *mins = tile.min;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 acc[kRows][2];
  for (auto& row : acc)
    for (__m256& sum : row) sum = _mm256_setzero_ps();
  for (int64_t s = from / kSub; s < to / kSub; ++s) {
    __m256i sum[kRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      sum[r][0] = sum[r][1] = kind == Kind::kInt4 ? _mm256_set1_epi32(offset[r]) : _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < kSteps<kind>; ++j) {
      const __m256i w0 = _mm256_load_si256(codes + 2 * j), w1 = _mm256_load_si256(codes + 2 * j + 1);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256i inputs = _mm256_set1_epi32(q[j * kRows + r]);
        AddProducts<kind>(sum[r][0], w0, inputs);
        AddProducts<kind>(sum[r][1], w1, inputs);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i total = kind == Kind::kInt4 ? _mm256_madd_epi16(sum[r][v], ones) : sum[r][v];
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(scales + 8 * v), _mm256_set1_ps(x_scale[r]));
        acc[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, acc[r][v]);
        if constexpr (kAffine)
          acc[r][v] = _mm256_fmadd_ps(_mm256_load_ps(mins + 8 * v), _mm256_set1_ps(x_sum[r]), acc[r][v]);
      }
    codes += 2 * kSteps<kind>;
    q += kRows * kSteps<kind>;
    offset += kRows;
    x_scale += kRows;
    x_sum += kRows;
    scales += kTileRows;
    mins += kTileRows;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= m) break;
    float* out = y + (first + r) * w.rows + begin;
    float results[kTileRows];
    for (int v = 0; v < 2; ++v) _mm256_storeu_ps(results + 8 * v, acc[r][v]);
    for (int64_t i = 0; i < std::min(kTileRows, end - begin); ++i) Put(results[i], from, out + i);
  }
}

template <Kind kind, bool kAffine>
void TiledRows(const Weights& w, const TiledX& x, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const Tile tile = TileView(w, scratch);
  const Groups scales(w, w.scales), mins(w, w.mins);
  for (int64_t from = 0; from < w.cols; from += kPart) {
    const int64_t to = std::min(from + kPart, w.cols);
    for (int64_t row = begin; row < end; row += kTileRows) {
      Pack<kind>(w, scales, mins, row, from, to, tile);
      for (int64_t i = 0; i < m; i += kRows) Multiply<kind, kAffine>(w, x, tile, i, m, from, to, y, row, end);
    }
  }
}

void Tiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const TiledX x = TiledView(w, prepared, m);
  if (w.kind == Kind::kInt4) {
    const auto rows = w.mins ? TiledRows<Kind::kInt4, true> : TiledRows<Kind::kInt4, false>;
    return rows(w, x, m, y, begin, end, scratch);
  }
  const auto rows = w.mins ? TiledRows<Kind::kInt8, true> : TiledRows<Kind::kInt8, false>;
  rows(w, x, m, y, begin, end, scratch);
}

}  // namespace

const Kernels& Avx2Kernels() {
  static constexpr Kernels kernels = {"avx2", FewRows<Few>::Bytes, FewRows<Few>::Prepare, FewRows<Few>::Rows,
                                      TiledBytes, TiledPrepare, Tiled, TiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
