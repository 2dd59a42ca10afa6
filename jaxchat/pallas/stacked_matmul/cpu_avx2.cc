// x @ w.T for quantized weights on AVX2 (Haswell, Zen and later), which has no instruction for a dot product of bytes:
// "multiply unsigned by signed bytes, add neighbours" (maddubs) is exact in 16 bits as long as one side has 4.
//
// Few rows of x: reading the weights is what matters. 4-bit codes are lifted to 0 .. 15 and meet activations of 8 bits;
// 8-bit codes meet 15 bits as 16-bit integers. Many rows: a register tile of weight rows; all codes are planes of 4
// bits (8-bit ones two: code = 16 high + low), whose products are summed in 16 bits over 32 columns.
#include "cpu_common.h"

namespace jaxchat {
namespace {

constexpr int64_t kBlock = 256;            // columns that few rows take at a time
constexpr int64_t kSubs = kBlock / kSub;   // sub-groups in them: their scales fill a vector

__m256i LoadInts(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The scales (or minimums) of a row of weights, one per 32 columns, eight at a time.
class Scales {
 public:
  Scales(const Weights& w, const void* values)
      : values_(values), wide_(w.wide_scales), plain_(w.group == kSub && !w.wide_scales), subs_(w.cols / kSub),
        per_row_(w.cols / w.group), per_group_(w.group / kSub) {}

  // Whether `Narrow` serves.
  bool plain() const { return plain_; }

  __m256 Narrow(int64_t row, int64_t block) const {
    const auto* from = static_cast<const __m128i*>(static_cast<const void*>(
        static_cast<const uint16_t*>(values_) + row * per_row_ + block * kSubs));
    return _mm256_cvtph_ps(_mm_loadu_si128(from));
  }

  // Any group, type and number of columns; zero beyond the last.
  __m256 Any(int64_t row, int64_t block) const {
    alignas(32) float eight[kSubs];
    for (int64_t i = 0; i < kSubs; ++i) {
      const int64_t sub = block * kSubs + i;
      eight[i] = sub < subs_ ? LoadScale(values_, row * per_row_ + sub / per_group_, wide_) : 0.0f;
    }
    return _mm256_load_ps(eight);
  }

 private:
  const void* values_;
  bool wide_, plain_;
  int64_t subs_, per_row_, per_group_;
};

// ---------------------------------------------------------------- a few rows of x

// One block of one row of x, in the order in which the codes meet it.
template <Kind kind>
struct Block;
template <>
struct alignas(32) Block<Kind::kInt4> {
  static constexpr int kVectors = 4;  // of codes
  static constexpr int kBytes = 128;
  int8_t q[kVectors][2][32];     // [even columns, odd columns]
  int16_t offset[kVectors][16];  // takes back the lift of the codes, of two even and two odd columns each
  float scale[kSubs];
  float sum[kSubs];  // of the values, for affine weights
};
template <>
struct alignas(32) Block<Kind::kInt8> {
  static constexpr int kVectors = 8;
  static constexpr int kBytes = 256;
  int16_t q[kVectors][2][16];
  float scale[kSubs];
  float sum[kSubs];
};

int64_t Blocks(const Weights& w) { return (w.cols + kBlock - 1) / kBlock; }

void Prepare(const Weights& w, const float* x, Block<Kind::kInt4>* out) {
  for (int64_t b = 0; b < Blocks(w); ++b)
    for (int64_t s = 0; s < kSubs; ++s) {
      const int64_t start = b * kBlock + s * kSub;
      const Quantized sub = Quantize(x + start, w.inputs - start, 127);
      out[b].scale[s] = sub.scale;
      out[b].sum[s] = sub.sum;
      for (int64_t c = 0; c < kSub; ++c) out[b].q[s / 2][c % 2][s % 2 * 16 + c / 2] = static_cast<int8_t>(sub.q[c]);
      for (int64_t i = 0; i < kSub / 4; ++i) {
        const int total = sub.q[4 * i] + sub.q[4 * i + 1] + sub.q[4 * i + 2] + sub.q[4 * i + 3];
        out[b].offset[s / 2][s % 2 * 8 + i] = static_cast<int16_t>(w.mins ? 0 : -8 * total);
      }
    }
}

void Prepare(const Weights& w, const float* x, Block<Kind::kInt8>* out) {
  for (int64_t b = 0; b < Blocks(w); ++b)
    for (int64_t s = 0; s < kSubs; ++s) {
      const int64_t start = b * kBlock + s * kSub;
      const Quantized sub = Quantize(x + start, w.inputs - start, 32767);
      out[b].scale[s] = sub.scale;
      out[b].sum[s] = sub.sum;
      for (int64_t c = 0; c < kSub; ++c) out[b].q[s][c % 2][c / 2] = sub.q[c];
    }
}

// Adds the products of a block, or of its first `vectors`, to M sums.
template <int M, bool kAffine>
inline void Step(const uint8_t* codes, int vectors, __m256 scales, __m256 mins, const Block<Kind::kInt4>* x,
                 int64_t stride, __m256* acc) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i even[4], odd[4];
  for (int v = 0; v < vectors; ++v) {
    __m256i raw = LoadInts(codes + 32 * v);
    // Affine codes are unsigned as they are.
    if constexpr (!kAffine) raw = _mm256_xor_si256(raw, _mm256_set1_epi8(static_cast<char>(0x88)));
    even[v] = _mm256_and_si256(raw, nibble);
    odd[v] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
  }
  for (int m = 0; m < M; ++m) {
    const auto& block = x[m * stride];
    const __m256 scale = _mm256_mul_ps(scales, _mm256_load_ps(block.scale));
    __m256 sum = kAffine ? _mm256_mul_ps(mins, _mm256_load_ps(block.sum)) : _mm256_setzero_ps();
    for (int v = 0; v < vectors; ++v) {
      __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even[v], LoadInts(block.q[v][0])),
                                       _mm256_maddubs_epi16(odd[v], LoadInts(block.q[v][1])));
      if constexpr (!kAffine) pairs = _mm256_add_epi16(pairs, LoadInts(block.offset[v]));
      // Half a vector is one sub-group.
      const __m256i half = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * v));
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones)),
                            _mm256_permutevar8x32_ps(scale, half), sum);
    }
    acc[m] = _mm256_add_ps(acc[m], sum);
  }
}

template <int M, bool kAffine>
inline void Step(const uint8_t* codes, int vectors, __m256 scales, __m256 mins, const Block<Kind::kInt8>* x,
                 int64_t stride, __m256* acc) {
  alignas(32) float scale[M][kSubs];
  __m256 sum[M];
  for (int m = 0; m < M; ++m) {
    const auto& block = x[m * stride];
    _mm256_store_ps(scale[m], _mm256_mul_ps(scales, _mm256_load_ps(block.scale)));
    sum[m] = kAffine ? _mm256_mul_ps(mins, _mm256_load_ps(block.sum)) : _mm256_setzero_ps();
  }
  for (int v = 0; v < vectors; ++v) {
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

// Blocks [from, to) of M rows of x times one row of the weights.
template <Kind kind, int M, bool kAffine>
void Row(const Weights& w, const Scales& scales, const Scales& mins, const Block<kind>* x, int64_t row, int64_t from,
         int64_t to, float* y) {
  constexpr int64_t kBytes = Block<kind>::kBytes;
  const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols, stride = Blocks(w);
  const auto* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
  const int64_t whole = std::min(bytes / kBytes, to);
  const __m256 none = _mm256_setzero_ps();
  __m256 acc[M];
  for (int m = 0; m < M; ++m) acc[m] = none;
  if (scales.plain())
    for (int64_t b = from; b < whole; ++b)
      Step<M, kAffine>(codes + b * kBytes, Block<kind>::kVectors, scales.Narrow(row, b),
                       kAffine ? mins.Narrow(row, b) : none, x + b, stride, acc);
  else
    for (int64_t b = from; b < whole; ++b)
      Step<M, kAffine>(codes + b * kBytes, Block<kind>::kVectors, scales.Any(row, b),
                       kAffine ? mins.Any(row, b) : none, x + b, stride, acc);
  if (whole < to) {
    uint8_t last[kBytes] = {};
    const int64_t left = bytes - whole * kBytes;
    std::memcpy(last, codes + whole * kBytes, left);
    Step<M, kAffine>(last, (left + 31) / 32, scales.Any(row, whole), kAffine ? mins.Any(row, whole) : none, x + whole,
                     stride, acc);
  }
  for (int m = 0; m < M; ++m) {
    float* to_y = y + m * w.rows + row;
    *to_y = Sum(Bits<Floats>(acc[m])) + (from > 0 ? *to_y : 0.0f);
  }
}

template <Kind kind, bool kAffine>
void Rows(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
  const auto* x = static_cast<const Block<kind>*>(prepared);
  const Scales scales(w, w.scales), mins(w, w.mins);
  ForRowsInBlocks<4>(m, begin, end, Blocks(w), sizeof(Block<kind>),
                     [&](auto count, int64_t i, int64_t row, int64_t from, int64_t to) {
                       Row<kind, decltype(count)::value, kAffine>(w, scales, mins, x + i * Blocks(w), row, from, to,
                                                                  y + i * w.rows);
                     });
}

int64_t FewBytes(const Weights& w, int64_t m) {
  if (w.kind == Kind::kInt4) return m * Blocks(w) * sizeof(Block<Kind::kInt4>);
  if (w.kind == Kind::kInt8) return m * Blocks(w) * sizeof(Block<Kind::kInt8>);
  return 0;
}

template <Kind kind>
void PrepareAll(const Weights& w, const float* x, int64_t m, void* out) {
  for (int64_t i = 0; i < m; ++i) Prepare(w, x + i * w.inputs, static_cast<Block<kind>*>(out) + i * Blocks(w));
}

void FewPrepare(const Weights& w, const float* x, int64_t m, void* out) {
  if (w.kind == Kind::kInt4) PrepareAll<Kind::kInt4>(w, x, m, out);
  if (w.kind == Kind::kInt8) PrepareAll<Kind::kInt8>(w, x, m, out);
}

template <Kind kind>
void QuantizedRows(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
  const auto rows = w.mins ? Rows<kind, true> : Rows<kind, false>;
  rows(w, prepared, m, y, begin, end);
}

void FewRows(const Weights& w, const float* x, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
  if (w.kind == Kind::kInt4) return QuantizedRows<Kind::kInt4>(w, prepared, m, y, begin, end);
  if (w.kind == Kind::kInt8) return QuantizedRows<Kind::kInt8>(w, prepared, m, y, begin, end);
  AnyFloatRows(w, x, m, y, begin, end);
}

// ---------------------------------------------------------------- many rows of x

// A tile is two vectors of weight rows wide, each lane four columns of one row: with 4 bits 16 rows, with 8 bits the
// high and the low halves of 8 rows.
template <Kind kind>
constexpr int64_t kTileRows = kind == Kind::kInt4 ? 16 : 8;
constexpr int kSteps = kSub / 4;      // in a sub-group
constexpr int64_t kPart = 1024;       // columns of a tile that stay in the first-level cache

// Prepared x, four rows at a time (those after the last are zero): bytes [m / 4, cols / 4, 4 rows, 4 columns] in the
// order in which the tile has the columns, then [m / 4, cols / 32, 4 rows] of what a sub-group needs beside them.
constexpr int64_t kRows = 4;
struct TiledX {
  int8_t* q;
  float* scale;
  float* sum;       // of the values, for affine weights
  int32_t* offset;  // takes back the lift of the codes, in 16 bits for each of the two pairs of columns in a lane
};

int64_t Padded(int64_t m) { return (m + kRows - 1) / kRows * kRows; }

int64_t TiledBytes(const Weights& w, int64_t m) { return Padded(m) * (w.cols + w.cols / kSub * 12); }

TiledX TiledView(const Weights& w, const void* prepared, int64_t m) {
  const int64_t count = Padded(m) * (w.cols / kSub);
  auto* q = static_cast<int8_t*>(const_cast<void*>(prepared));
  auto* scale = reinterpret_cast<float*>(q + Padded(m) * w.cols);
  return {q, scale, scale + count, reinterpret_cast<int32_t*>(scale + 2 * count)};
}

void TiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  const TiledX view = TiledView(w, out, m);
  const int64_t subs = w.cols / kSub;
  const bool lifted = w.kind == Kind::kInt8 || w.mins == nullptr;
  for (int64_t i = begin; i < Padded(end); ++i)
    for (int64_t s = 0; s < subs; ++s) {
      const Quantized sub = Quantize(x + i * w.inputs + s * kSub, i < m ? w.inputs - s * kSub : 0, 127);
      const int64_t at = (i / kRows * subs + s) * kRows + i % kRows;
      int8_t* q = view.q + (i / kRows * subs + s) * kRows * kSub + i % kRows * 4;
      int16_t totals[2] = {};
      for (int64_t c = 0; c < kSub; ++c) {
        // The low nibbles of 16 bytes are the even columns, the high ones the odd.
        const int64_t place = w.kind == Kind::kInt4 ? c % 2 * 16 + c / 2 : c;
        q[place / 4 * 4 * kRows + place % 4] = static_cast<int8_t>(sub.q[c]);
        totals[place / 2 % 2] += sub.q[c];
      }
      for (int16_t& total : totals) total = static_cast<int16_t>(lifted ? -8 * total : 0);
      std::memcpy(view.offset + at, totals, sizeof totals);
      view.scale[at] = sub.scale;
      view.sum[at] = sub.sum;
    }
}

// Part of a tile: codes [sub-group][step][vector][8 rows][4 columns], scales and minimums [sub-group][rows].
struct Tile {
  uint8_t* codes;
  float* scale;
  float* min;
};

int64_t TiledScratchBytes(const Weights&) { return kPart * 2 * 8 + kPart / kSub * 16 * 8; }

Tile TileView(void* scratch) {
  auto* codes = static_cast<uint8_t*>(scratch);
  auto* scale = reinterpret_cast<float*>(codes + kPart * 2 * 8);
  return {codes, scale, scale + kPart / kSub * 16};
}

// Eight by eight, of 32 bits.
inline void Transpose(__m256i* rows) {
  Floats floats[8];
  for (int i = 0; i < 8; ++i) floats[i] = Bits<Floats>(rows[i]);
  Transpose(floats);
  for (int i = 0; i < 8; ++i) rows[i] = Bits<__m256i>(floats[i]);
}

// Columns [from, to) of eight rows of weights, as vector v of the tile. (With 8 bits v is 0: they fill both.)
template <Kind kind>
void PackCodes(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int v, const Tile& tile) {
  const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols;
  const __m256i nibble = _mm256_set1_epi8(15), lift = _mm256_set1_epi8(static_cast<char>(0x88));
  auto* out = reinterpret_cast<__m256i*>(tile.codes) + v;
  constexpr int64_t kColumns = kind == Kind::kInt4 ? 64 : 32;  // of 32 bytes
  for (int64_t c = from; c < to; c += kColumns) {
    const bool half = c + kColumns > to;
    __m256i raw[8];
    for (int r = 0; r < 8; ++r) {
      const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + rows[r] * bytes + c * bytes / w.cols;
      raw[r] = half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))
                    : LoadInts(codes);
    }
    Transpose(raw);
    if constexpr (kind == Kind::kInt4) {
      for (int i = 0; i < (half ? 4 : 8); ++i) {  // four of a sub-group, each two steps
        const __m256i lifted = w.mins ? raw[i] : _mm256_xor_si256(raw[i], lift);
        __m256i* to_step = out + ((c - from) / kSub + i / 4) * kSteps * 2 + i % 4 * 2;
        to_step[0] = _mm256_and_si256(lifted, nibble);
        to_step[8] = _mm256_and_si256(_mm256_srli_epi16(lifted, 4), nibble);
      }
    } else {
      for (int i = 0; i < kSteps; ++i) {
        __m256i* to_step = out + ((c - from) / kSub * kSteps + i) * 2;
        // Two's complement is 16 high + low, high from -8: lifted to 0 .. 15.
        to_step[0] = _mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(raw[i], lift), 4), nibble);
        to_step[1] = _mm256_and_si256(raw[i], nibble);
      }
    }
  }
}

// The scales of eight rows from block `first` on, to out [sub-group][stride].
void PackScales(const Scales& scales, const int64_t* rows, int64_t first, int64_t subs, int64_t stride, float* out) {
  for (int64_t b = 0; b * kSubs < subs; ++b) {
    const bool plain = scales.plain() && (b + 1) * kSubs <= subs;
    Floats eight[8];
    for (int r = 0; r < 8; ++r)
      eight[r] = Bits<Floats>(plain ? scales.Narrow(rows[r], first + b) : scales.Any(rows[r], first + b));
    Transpose(eight);
    for (int64_t s = b * kSubs; s < std::min(subs, (b + 1) * kSubs); ++s) Store(out + s * stride, eight[s % kSubs]);
  }
}

template <Kind kind>
void Pack(const Weights& w, const Scales& scales, const Scales& mins, int64_t begin, int64_t from, int64_t to,
          const Tile& tile) {
  for (int v = 0; v < kTileRows<kind> / 8; ++v) {
    int64_t rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = std::min(begin + 8 * v + r, w.rows - 1);  // past the end: repeat the last
    PackCodes<kind>(w, rows, from, to, v, tile);
    PackScales(scales, rows, from / kBlock, (to - from) / kSub, kTileRows<kind>, tile.scale + 8 * v);
    if (w.mins) PackScales(mins, rows, from / kBlock, (to - from) / kSub, kTileRows<kind>, tile.min + 8 * v);
  }
}

inline __m256i Splat4(const void* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

// sum += products, in 16 bits. GCC would put off the additions of unrolled steps, and store what is to be added.
inline void Add16(__m256i& sum, __m256i products) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products)); }

// Columns [from, to) of four rows of x, the first a multiple of four, times a tile: added to y unless these are the
// first columns.
template <Kind kind, bool kAffine>
__attribute__((noinline)) void Multiply(const Weights& w, const TiledX& x, const Tile& tile, int64_t first, int64_t m,
                                        int64_t from, int64_t to, float* y, int64_t begin, int64_t end) {
  constexpr int kOuts = kTileRows<kind> / 8;
  const int64_t at = first / kRows * (w.cols / kSub) + from / kSub;  // the first sub-group
  const auto* codes = reinterpret_cast<const __m256i*>(tile.codes);
  const int8_t* q = x.q + at * kRows * kSub;
  const int32_t* offset = x.offset + at * kRows;
  const float *x_scale = x.scale + at * kRows, *x_sum = x.sum + at * kRows, *scales = tile.scale, *mins = tile.min;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 acc[kRows][kOuts];
  for (auto& row : acc)
    for (__m256& sum : row) sum = _mm256_setzero_ps();
  for (int64_t s = from / kSub; s < to / kSub; ++s) {
    __m256i sum[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = Splat4(offset + r);
      sum[r][1] = kind == Kind::kInt4 ? sum[r][0] : _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j) {
      const __m256i w0 = _mm256_load_si256(codes + 2 * j), w1 = _mm256_load_si256(codes + 2 * j + 1);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i four = Splat4(q + (j * kRows + r) * 4);
        Add16(sum[r][0], _mm256_maddubs_epi16(w0, four));
        Add16(sum[r][1], _mm256_maddubs_epi16(w1, four));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 xs = _mm256_set1_ps(x_scale[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kOuts; ++v) {
        __m256i total = _mm256_madd_epi16(sum[r][v], kind == Kind::kInt4 ? ones : _mm256_set1_epi16(16));
        if constexpr (kind == Kind::kInt8) total = _mm256_add_epi32(total, _mm256_madd_epi16(sum[r][1], ones));
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(scales + 8 * v), xs);
        acc[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, acc[r][v]);
        if constexpr (kAffine)
          acc[r][v] = _mm256_fmadd_ps(_mm256_load_ps(mins + 8 * v), _mm256_set1_ps(x_sum[r]), acc[r][v]);
      }
    }
    codes += 2 * kSteps;
    q += kRows * kSub;
    offset += kRows;
    x_scale += kRows;
    x_sum += kRows;
    scales += kTileRows<kind>;
    mins += kTileRows<kind>;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (first + r == m) break;
    float* out = y + (first + r) * w.rows + begin;
    float results[kTileRows<kind>];
    for (int v = 0; v < kOuts; ++v) _mm256_storeu_ps(results + 8 * v, acc[r][v]);
    for (int64_t i = 0; i < std::min(kTileRows<kind>, end - begin); ++i)
      out[i] = from > 0 ? out[i] + results[i] : results[i];
  }
}

template <Kind kind, bool kAffine>
void TiledRows(const Weights& w, const TiledX& x, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const Tile tile = TileView(scratch);
  const Scales scales(w, w.scales), mins(w, w.mins);
  for (int64_t from = 0; from < w.cols; from += kPart) {
    const int64_t to = std::min(from + kPart, w.cols);
    for (int64_t row = begin; row < end; row += kTileRows<kind>) {
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
  static constexpr Kernels kernels = {"avx2",     FewBytes,     FewPrepare, FewRows,
                                      TiledBytes, TiledPrepare, Tiled,      TiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
