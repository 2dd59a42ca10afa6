// x @ w.T for quantized weights on AVX2 (Haswell, Zen and later), which has no instruction for a dot product of bytes:
// "multiply unsigned by signed bytes, add neighbours" (maddubs) is exact in 16 bits as long as one side has 4.
//
// Few rows of x: reading the weights is what matters. Many rows: a register tile of weight rows. 4-bit codes are lifted
// to 0 .. 15 and meet activations of 8 bits in 16-bit sums; 8-bit codes and activations of 15 bits are 16-bit integers.
#define JAXCHAT_ISA JAXCHAT_AVX2
#include "../cpu_target.h"

#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::avx2 {
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
template <int kBits>
struct Block;
template <>
struct alignas(32) Block<4> {
  static constexpr int kBytes = 128;
  static constexpr int kMost = 8;
  int32_t q[4][2][kSubs];  // of each vector of codes the even and the odd columns, four together
  int32_t offset[kSubs];  // takes back the lift of the codes; like `scale` in the order of `Place`
  float scale[kSubs];
  float sum[kSubs];  // of the values, for affine weights
};
template <>
struct alignas(32) Block<8> {
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

template <bool kAffine>
void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t rows, Block<4>* out) {
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
      out[b].offset[Place(s)] = kAffine ? 0 : -8 * sub.total;
      out[b].scale[Place(s)] = sub.scale;
      out[b].sum[s] = sub.sum;
    }
}

template <bool kAffine>
void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t, Block<8>* out) {
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
inline void Step(const uint8_t* codes, __m256 scales, __m256 mins, const Block<4>* x, int64_t stride,
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
inline void Step(const uint8_t* codes, __m256 scales, __m256 mins, const Block<8>* x, int64_t stride,
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

template <int kBits, bool kAffine>
struct Few {
  using Block = avx2::Block<kBits>;
  static constexpr int kMost = Block::kMost;

  static int64_t Blocks(const Weights& w) { return (w.cols + kBlock - 1) / kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t rows, Block* out) {
    PrepareRow<kAffine>(w, x, Blocks(w), rows, out);
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    constexpr int64_t kBytes = Block::kBytes;
    const int64_t bytes = CodeBytes<kBits>(w), stride = Blocks(w);
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

// Eight by eight, of 32 bits.
inline void Transpose(__m256i* rows) {
  Floats floats[8];
  for (int i = 0; i < 8; ++i) floats[i] = Bits<Floats>(rows[i]);
  Transpose(floats);
  for (int i = 0; i < 8; ++i) rows[i] = Bits<__m256i>(floats[i]);
}

// sum += a * b, pairs of bytes in 16 bits or pairs of 16 bits in 32. GCC would put off the additions of unrolled steps,
// and store what is to be added.
template <int kBits>
inline void AddProducts(__m256i& sum, __m256i a, __m256i b) {
  if constexpr (kBits == 4)
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(a, b)));
  else
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
}

// What 32 columns become: a lane has 32 bits of one row, four columns of 4-bit codes as bytes, or two columns of 8-bit
// codes as 16-bit integers. So many steps take a sub-group.
template <int kBits>
struct Order;

template <>
struct Order<4> {
  static constexpr int kSteps = kSub / 4, kLevels = 127;

  // The sums of 16-bit lanes 0, 2, 4, ... and 1, 3, 5, ..., minus `lift` times.
  static int32_t Prepare(const Quantized& x, char lift, __m256i* out) {
    __m256i even, odd;
    SplitInts(x, &even, &odd);
    *out = EvenOdd(even, odd);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(lift), *out);
    __m128i four = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b01001110));
    four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b10110001));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), four));
  }

  // Four bytes of eight rows, i-th of 32 bytes: of a sub-group's 16, each is two steps.
  static void Unpack(__m256i raw, int i, char lift, __m256i* out) {
    const __m256i nibble = _mm256_set1_epi8(15), lifted = _mm256_xor_si256(raw, _mm256_set1_epi8(lift));
    __m256i* step = out + (i / 4 * kSteps + i % 4) * 2;
    step[0] = _mm256_and_si256(lifted, nibble);
    step[8] = _mm256_and_si256(_mm256_srli_epi16(lifted, 4), nibble);
  }

  static __m256i Total(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

template <>
struct Order<8> {
  static constexpr int kSteps = kSub / 2, kLevels = 32767;

  static int32_t Prepare(const Quantized& x, char, __m256i* out) {
    for (int v = 0; v < 2; ++v) {
      const __m256i words = _mm256_packs_epi32(Bits<__m256i>(x.q[2 * v]), Bits<__m256i>(x.q[2 * v + 1]));
      out[v] = _mm256_permute4x64_epi64(words, 0b11011000);
    }
    return 0;
  }

  // Four columns: two steps. The bytes of a step go to the upper halves of 16 bits, then down.
  static void Unpack(__m256i raw, int i, char, __m256i* out) {
    for (int b = 0; b < 4; b += 2) {
      const __m128i four =
          _mm_setr_epi8(-1, b, -1, b + 1, -1, b + 4, -1, b + 5, -1, b + 8, -1, b + 9, -1, b + 12, -1, b + 13);
      out[4 * i + b] = _mm256_srai_epi16(_mm256_shuffle_epi8(raw, _mm256_broadcastsi128_si256(four)), 8);
    }
  }

  static __m256i Total(__m256i sums) { return sums; }
};

// Two vectors of eight weight rows, [step][vector]; six rows of x, [step][row]. Six rows' sums, two vectors of weights
// and two more fill the registers.
template <int kBits, bool kAffine_>
struct Tile {
  using Code = int32_t;
  using Input = int32_t;
  using O = Order<kBits>;
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kRows = 16, kPart = 2048, kPanel = 6;
  static constexpr int kMost = 6, kLevels = O::kLevels, kInputs = O::kSteps, kCodes = O::kSteps;
  static constexpr bool kLifted = kBits == 4 && !kAffine;  // affine codes are unsigned as they are

  static int32_t Prepare(const Quantized& x, int64_t lane, int32_t* panel) {
    alignas(32) int32_t q[kSub / 2];
    const int32_t start = O::Prepare(x, kLifted ? 8 : 0, reinterpret_cast<__m256i*>(q));
    for (int j = 0; j < O::kSteps; ++j) panel[j * kPanel + lane] = q[j];
    return start;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int32_t* out) {
    for (int v = 0; v < 2; ++v) PackVector(w, rows + 8 * v, from, to, reinterpret_cast<__m256i*>(out) + v);
  }

  template <int M>
  static void Products(const int32_t* tile, const int32_t* q, int64_t, const int32_t* starts, Ints (&sums)[M][2]) {
    const auto* codes = reinterpret_cast<const __m256i*>(tile);
    __m256i sum[M][2];
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
      sum[r][0] = sum[r][1] = kBits == 4 ? _mm256_set1_epi32(starts[r]) : _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < O::kSteps; ++j) {
      const __m256i w0 = _mm256_load_si256(codes + 2 * j), w1 = _mm256_load_si256(codes + 2 * j + 1);
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r) {
        const __m256i inputs = _mm256_set1_epi32(q[j * M + r]);
        AddProducts<kBits>(sum[r][0], w0, inputs);
        AddProducts<kBits>(sum[r][1], w1, inputs);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sums[r][v] = Bits<Ints>(O::Total(sum[r][v]));
  }

 private:
  // Columns [from, to) of eight rows of weights, to every second vector.
  static void PackVector(const Weights& w, const int64_t* rows, int64_t from, int64_t to, __m256i* out) {
    constexpr int64_t kColumns = 32 * 8 / kBits;  // of 32 bytes
    const int64_t bytes = (to - from) * kBits / 8;
    const uint8_t* codes[8];
    for (int r = 0; r < 8; ++r)
      codes[r] = static_cast<const uint8_t*>(w.codes) + (rows[r] * w.cols + from) * kBits / 8;
    for (int64_t at = 0; at < bytes; at += 32, out += kColumns / kSub * O::kSteps * 2) {
      const bool half = at + 32 > bytes;
      __m256i raw[8];
      for (int r = 0; r < 8; ++r)
        raw[r] = half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + at)))
                      : LoadInts(codes[r] + at);
      Transpose(raw);
      for (int i = 0; i < (half ? 4 : 8); ++i) O::Unpack(raw[i], i, static_cast<char>(kLifted ? 0x88 : 0), out);
    }
  }
};

}  // namespace

const KernelTable kProducts = TableOf<Few, Tile>({});

}  // namespace jaxchat::avx2
JAXCHAT_END
