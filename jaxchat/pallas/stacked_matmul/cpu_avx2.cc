// x @ w.T for quantized weights on AVX2 (Haswell, Zen and later), which has no instruction for a dot product of bytes:
// "multiply unsigned by signed bytes, add neighbours" (maddubs) is exact in 16 bits as long as one side has 4.
//
// Few rows of x: reading the weights is what matters. Many rows: a register tile of weight rows. Codes of 4 to 6 bits are
// unsigned and meet activations of 8 bits in 16-bit sums; 8-bit codes and activations of 15 bits are 16-bit integers.
#define JAXCHAT_ISA JAXCHAT_AVX2
#include "../cpu_target.h"

#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::avx2 {
namespace {

constexpr int64_t kBlock = 256;           // columns that few rows take at a time
constexpr int64_t kRuns = kBlock / kRun;  // runs in them: their scales fill a vector

__m256i LoadInts(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// ---------------------------------------------------------------- the order of columns

// 32 columns of 16 bits: the even ones, then the odd ones.
void SplitInts(const Ints* q, __m256i* even, __m256i* odd) {
  const auto pick = [](Ints a, Ints b, auto which) {
    return Bits<__m256i>(_mm256_shuffle_ps(Bits<__m256>(a), Bits<__m256>(b), decltype(which)::value));
  };
  constexpr std::integral_constant<int, 0x88> kEven;
  constexpr std::integral_constant<int, 0xdd> kOdd;
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  *even = _mm256_permutevar8x32_epi32(
      _mm256_packs_epi32(pick(q[0], q[1], kEven), pick(q[2], q[3], kEven)), order);
  *odd = _mm256_permutevar8x32_epi32(
      _mm256_packs_epi32(pick(q[0], q[1], kOdd), pick(q[2], q[3], kOdd)), order);
}

// The even columns as bytes, then the odd ones: the order in which the nibbles of 16 bytes unpack.
__m256i EvenOdd(__m256i even, __m256i odd) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(even, odd), 0b11011000);
}

// The eight scales (or minimums) of some sub-groups: float16, integers of a block, and any, zero beyond the last.
inline __m256 PlainScales(const Groups& groups, int64_t row, int64_t sub) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(groups.Plain(row, sub))));
}

inline __m256 IntegerScales(const Groups& groups, int64_t row, int64_t sub) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(groups.Integers(row, sub)));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), _mm256_set1_ps(Half(*groups.Outer(row, sub))));
}

inline __m256 AnyScales(const Groups& groups, int64_t row, int64_t sub, int64_t subs) {
  Floats eight{};
  for (int64_t i = 0; i < std::min<int64_t>(8, subs - sub); ++i) eight[i] = groups.At(row, sub + i);
  return Bits<__m256>(eight);
}

// ---------------------------------------------------------------- a few rows of x

// One block of one row of x, in the order in which the codes meet it: nibbles, maybe with bits above them.
template <int kBits>
struct alignas(32) Block {
  static constexpr int64_t kSub = SubOf(kBits);
  static constexpr int kBytes = 128, kMost = 8, kParts = kRun / kSub;
  int32_t q[4][2][8];         // of each vector of codes the even and the odd columns, four together
  int32_t offset[kParts][8];  // takes back the lift of the codes; like `scale` in the order of `Place`
  float scale[kParts][8];
  float sum[8];  // of the values, for affine weights
};
template <>
struct alignas(32) Block<8> {
  static constexpr int64_t kSub = kRun;
  static constexpr int kBytes = 256, kMost = 4, kParts = 1;
  int16_t q[8][2][16];
  float scale[kRuns];
  float sum[kRuns];
};

// Which lane sums up run r: vector v has 2 v and 2 v + 1, one in each half. Of two parts of a run, which lane of the
// vector of runs 0 to 3 or 4 to 7.
template <int kParts>
constexpr int64_t Place(int64_t r, int64_t part) {
  return kParts == 1 ? r / 2 + r % 2 * 4 : r % 4 / 2 * 2 + part + r % 2 * 4;
}

// Whether 4-bit codes are dealt: of every sub-group four bytes to each vector, so that the sums of the vectors add up
// lane by lane. Done once for all rows of x; folding the sums of vectors as they are is done for each.
template <int kBits>
constexpr bool Dealt(int64_t rows) {
  return kBits == 4 && rows > 4;
}

template <bool kAffine, int kBits>
void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t rows, Block<kBits>* out) {
  constexpr int64_t kSub = SubOf(kBits);
  constexpr int kParts = Block<kBits>::kParts;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t r = 0; r < kRuns; ++r) {
      Ints q[kRun / kLanes];
      for (int64_t p = 0; p < kParts; ++p) {
        const int64_t start = b * kBlock + r * kRun + p * kSub, place = Place<kParts>(r, p);
        const auto sub = Quantize<kSub>(x + start, w.inputs - start, 127);
        std::memcpy(q + p * sub.kVectors, sub.q, sizeof sub.q);
        const int64_t vector = kParts == 1 ? 0 : r / 4;
        out[b].offset[vector][place] = -LiftOf(kBits, kAffine) * sub.total;
        out[b].scale[vector][place] = sub.scale;
        out[b].sum[r] = sub.sum;
      }
      __m256i even, odd;
      SplitInts(q, &even, &odd);
      const Ints fours = Bits<Ints>(EvenOdd(even, odd));
      for (int i = 0; i < 8; ++i) {
        const int64_t at = i % 4, half = i / 4;
        (Dealt<kBits>(rows) ? out[b].q[at][half][Place<1>(r, 0)] : out[b].q[r / 2][half][r % 2 * 4 + at]) = fours[i];
      }
    }
}

template <bool kAffine>
void PrepareRow(const Weights& w, const float* x, int64_t blocks, int64_t, Block<8>* out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t s = 0; s < kRuns; ++s) {
      const int64_t start = b * kBlock + s * kRun;
      const auto sub = Quantize<kRun>(x + start, w.inputs - start, 32767);
      out[b].scale[s] = sub.scale;
      out[b].sum[s] = sub.sum;
      __m256i even, odd;
      SplitInts(sub.q, &even, &odd);
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

// Bits above the fourth on the low halves of two runs, vector v of four: even columns (i = 0) or odd ones. `high` is
// what a block has of them (see packing.py).
template <int kBits>
inline void AddHigh(const uint8_t* high, int v, __m256i* even, __m256i* odd) {
  if constexpr (kBits == 5) {  // four bytes of codes meet one word, at bits 2 j and 2 j + 1 of its bytes
    const __m256i words = _mm256_permutevar8x32_epi32(
        LoadInts(high), _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * v)));
    const __m256i bits = _mm256_srlv_epi32(words, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    const __m256i mask = _mm256_set1_epi8(0x10);
    *even = _mm256_or_si256(*even, _mm256_and_si256(_mm256_slli_epi32(bits, 4), mask));
    *odd = _mm256_or_si256(*odd, _mm256_and_si256(_mm256_slli_epi32(bits, 3), mask));
  } else {  // two words a run, at bits 4 j and 4 j + 2
    const __m256i four = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(high + v * 16)));
    const __m256i words = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    const __m256i bits = _mm256_srlv_epi32(words, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    const __m256i mask = _mm256_set1_epi8(0x30);
    *even = _mm256_or_si256(*even, _mm256_and_si256(_mm256_slli_epi32(bits, 4), mask));
    *odd = _mm256_or_si256(*odd, _mm256_and_si256(_mm256_slli_epi32(bits, 2), mask));
  }
}

// Scales of a block: as they come, and minimums.
template <int kBits>
struct Factors {
  __m256 scale[Block<kBits>::kParts];
  __m256 min;
};

// Adds the products of a block to M sums.
template <int kBits, int M, bool kAffine>
inline void Step(const uint8_t* codes, const uint8_t* high, Factors<kBits> by, const Block<kBits>* x, int64_t stride,
                 __m256* acc) {
  constexpr int kParts = Block<kBits>::kParts;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i dealt[4], even[4], odd[4];
  if constexpr (Dealt<kBits>(M)) Deal(codes, dealt);
  for (int v = 0; v < 4; ++v) {
    __m256i raw = Dealt<kBits>(M) ? dealt[v] : LoadInts(codes + 32 * v);
    // Signed nibbles are lifted; all others are unsigned as they are.
    if constexpr (kBits == 4 && !kAffine) raw = _mm256_xor_si256(raw, _mm256_set1_epi8(static_cast<char>(0x88)));
    even[v] = _mm256_and_si256(raw, nibble);
    odd[v] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
    if constexpr (kBits > 4) AddHigh<kBits>(high, v, &even[v], &odd[v]);
  }
  // As `Place`.
  const __m256i order =
      kParts == 1 ? _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7) : _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  for (int p = 0; p < kParts; ++p) by.scale[p] = _mm256_permutevar8x32_ps(by.scale[p], order);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto& block = x[m * stride];
    // In 16 bits, which hold four products of 6 bits and half of a sub-group of 4: 16 * 15 * 127.
    __m256i sum[4];
    for (int v = 0; v < 4; ++v)
      sum[v] = _mm256_add_epi16(_mm256_maddubs_epi16(even[v], LoadInts(block.q[v][0])),
                                _mm256_maddubs_epi16(odd[v], LoadInts(block.q[v][1])));
    __m256i total[2];
    if constexpr (kBits > 4) {
      for (int v = 0; v < 4; ++v) sum[v] = _mm256_madd_epi16(sum[v], ones);
      total[0] = _mm256_hadd_epi32(sum[0], sum[1]);
      total[1] = _mm256_hadd_epi32(sum[2], sum[3]);
      if constexpr (kParts == 1) total[0] = _mm256_hadd_epi32(total[0], total[1]);
    } else {
      __m256i pairs;  // of 16-bit sums of a sub-group
      if constexpr (Dealt<kBits>(M)) {
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
      total[0] = _mm256_madd_epi16(pairs, ones);
    }
    for (int p = 0; p < kParts; ++p) {
      const __m256 exact = _mm256_cvtepi32_ps(_mm256_add_epi32(total[p], LoadInts(block.offset[p])));
      acc[m] = _mm256_fmadd_ps(exact, _mm256_mul_ps(by.scale[p], _mm256_load_ps(block.scale[p])), acc[m]);
    }
    if constexpr (kAffine) acc[m] = _mm256_fmadd_ps(by.min, _mm256_load_ps(block.sum), acc[m]);
  }
}

template <int M, bool kAffine>
inline void Step8(const uint8_t* codes, __m256 scales, __m256 mins, const Block<8>* x, int64_t stride, __m256* acc) {
  alignas(32) float scale[M][kRuns];
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

template <int kBits_, bool kAffine>
struct Few {
  static constexpr int kBits = kBits_;
  using Block = avx2::Block<kBits>;
  using Factors = avx2::Factors<kBits>;
  static constexpr int kMost = Block::kMost;

  static int64_t Blocks(const Weights& w) { return (w.cols + kBlock - 1) / kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t rows, Block* out) {
    PrepareRow<kAffine>(w, x, Blocks(w), rows, out);
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    constexpr int64_t kBytes = Block::kBytes, kHighBytes = HighBytes<kBits>(kBlock);
    const int64_t bytes = CodeBytes<kBits>(w.cols), stride = Blocks(w), subs = w.cols / Block::kSub;
    const uint8_t *codes = Codes<kBits>(w, row), *high = High<kBits>(w, row);
    const int64_t whole = std::min(bytes / kBytes, to);
    __m256 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_ps();
    // The blocks from b to `end`, with scales as scale(groups, number of the first sub-group) finds them.
    int64_t b = from;
    const auto run = [&](int64_t end, const uint8_t* at, const uint8_t* high_at, auto scale) {
      for (; b < end; ++b, at += kBytes, high_at += kHighBytes) {
        Prefetch<kBytes>(at);
        if constexpr (kHighBytes > 0) Prefetch<kHighBytes>(high_at);
        Factors by{};
        for (int p = 0; p < Block::kParts; ++p) by.scale[p] = scale(scales, (b * Block::kParts + p) * kRuns);
        if constexpr (kAffine) by.min = scale(mins, b * kRuns);
        if constexpr (kBits == 8)
          Step8<M, kAffine>(at, by.scale[0], by.min, x + b, stride, acc);
        else
          Step<kBits, M, kAffine>(at, high_at, by, x + b, stride, acc);
      }
    };
    const auto any = [&](const Groups& groups, int64_t sub) { return AnyScales(groups, row, sub, subs); };
    const uint8_t *first = codes + b * kBytes, *first_high = high + b * kHighBytes;
    if (scales.plain())
      run(whole, first, first_high, [&](const Groups& groups, int64_t sub) { return PlainScales(groups, row, sub); });
    else if (scales.integers())
      run(whole, first, first_high, [&](const Groups& groups, int64_t sub) { return IntegerScales(groups, row, sub); });
    else
      run(whole, first, first_high, any);
    if (whole < to) {
      uint8_t last[kBytes] = {}, last_high[kHighBytes + 1] = {};
      std::memcpy(last, codes + whole * kBytes, bytes - whole * kBytes);
      if constexpr (kHighBytes > 0)
        std::memcpy(last_high, high + whole * kHighBytes, HighBytes<kBits>(w.cols) - whole * kHighBytes);
      run(to, last, last_high, any);
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
  if constexpr (kBits < 8)
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(a, b)));
  else
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
}

// What a sub-group becomes: a lane has 32 bits of one row, four columns as bytes, or two columns of 8-bit codes as 16-bit
// integers. So many steps take a sub-group; after kFold of them the sums of 16 bits are full.
template <int kBits>
struct Order {
  static constexpr int64_t kSub = SubOf(kBits);
  static constexpr int kSteps = kSub / 4, kLevels = 127, kFold = kBits == 4 ? kSteps : kSteps / 2;

  // To even columns, then odd ones. What sums start from: of 4 bits those of 16-bit lanes 0, 2, 4, ... and 1, 3, 5, ...,
  // minus `lift` times; else that of a row, in 32 bits.
  static int32_t Prepare(const Quantized<kSub>& x, int lift, int32_t* out) {
    Ints q[kRun / kLanes] = {};
    std::memcpy(q, x.q, sizeof x.q);
    __m256i even, odd;
    SplitInts(q, &even, &odd);
    const __m256i bytes = EvenOdd(even, odd);
    alignas(32) int32_t fours[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(fours), bytes);
    for (int j = 0; j < kSteps; ++j) out[j] = fours[j / (kSteps / 2) * 4 + j % (kSteps / 2)];
    if constexpr (kBits > 4) return -lift * x.total;
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(static_cast<char>(lift)), bytes);
    __m128i four = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b01001110));
    four = _mm_add_epi16(four, _mm_shuffle_epi32(four, 0b10110001));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), four));
  }

  // Bytes 4 v to 4 v + 3 of a run of eight rows: two steps. `high`: the rows' words of the bits above.
  template <int v>
  static void Unpack(__m256i raw, const __m256i* high, char lift, __m256i* run) {
    constexpr int kHalf = kSteps / 2, kFirst = v / kHalf * kSteps + v % kHalf;
    const __m256i nibble = _mm256_set1_epi8(15), lifted = _mm256_xor_si256(raw, _mm256_set1_epi8(lift));
    run[2 * kFirst] = AddBits<2 * v>(_mm256_and_si256(lifted, nibble), high);
    run[2 * (kFirst + kHalf)] = AddBits<2 * v + 1>(_mm256_and_si256(_mm256_srli_epi16(lifted, 4), nibble), high);
  }

  static __m256i Total(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

 private:
  template <int kField>
  static __m256i AddBits(__m256i low, const __m256i* high) {
    if constexpr (kBits == 4) {
      return low;
    } else {
      constexpr int kWide = kBits - 4, kFrom = kField % (8 / kWide) * kWide;
      const __m256i word = high[kField / (8 / kWide)];
      const __m256i moved = kFrom < 4 ? _mm256_slli_epi32(word, 4 - kFrom) : _mm256_srli_epi32(word, kFrom - 4);
      return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(kWide == 1 ? 0x10 : 0x30)));
    }
  }
};

template <>
struct Order<8> {
  static constexpr int64_t kSub = kRun;
  static constexpr int kSteps = kSub / 2, kLevels = 32767, kFold = kSteps;

  static int32_t Prepare(const Quantized<kSub>& x, int, int32_t* out) {
    for (int v = 0; v < 2; ++v) {
      const __m256i words = _mm256_packs_epi32(Bits<__m256i>(x.q[2 * v]), Bits<__m256i>(x.q[2 * v + 1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + v, _mm256_permute4x64_epi64(words, 0b11011000));
    }
    return 0;
  }

  // Four columns: two steps. The bytes of a step go to the upper halves of 16 bits, then down.
  template <int i>
  static void Unpack(__m256i raw, const __m256i*, char, __m256i* out) {
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
template <int kBits_, bool kAffine_>
struct Tile {
  using Code = int32_t;
  using Input = int32_t;
  using O = Order<kBits_>;
  static constexpr int kBits = kBits_;
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kRows = 16, kPart = 2048, kPanel = 6;
  static constexpr int kMost = 6, kLevels = O::kLevels, kInputs = O::kSteps, kCodes = O::kSteps;

  static int32_t Prepare(const Quantized<O::kSub>& x, int64_t lane, int32_t* panel) {
    int32_t q[O::kSteps];
    const int32_t start = O::Prepare(x, kBits == 8 ? 0 : LiftOf(kBits, kAffine), q);
    for (int j = 0; j < O::kSteps; ++j) panel[j * kPanel + lane] = q[j];
    return start;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int32_t* out) {
    for (int v = 0; v < 2; ++v) PackVector(w, rows + 8 * v, from, to, reinterpret_cast<__m256i*>(out) + v);
  }

  template <int M>
  static void Products(const int32_t* tile, const int32_t* q, int64_t, const int32_t* starts, Ints (&sums)[M][2]) {
    constexpr bool kInts = kBits > 4;  // sums start in 32 bits
    const auto* codes = reinterpret_cast<const __m256i*>(tile);
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) sums[r][0] = sums[r][1] = Ints{} + (kInts ? starts[r] : 0);
    for (int fold = 0; fold < O::kSteps; fold += O::kFold) {
      __m256i sum[M][2];
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r)
        sum[r][0] = sum[r][1] = kInts ? _mm256_setzero_si256() : _mm256_set1_epi32(starts[r]);
#pragma GCC unroll 8
      for (int j = fold; j < fold + O::kFold; ++j) {
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
        for (int v = 0; v < 2; ++v) sums[r][v] += Bits<Ints>(O::Total(sum[r][v]));
    }
  }

 private:
  // Columns [from, to) of eight rows of weights, to every second vector.
  static void PackVector(const Weights& w, const int64_t* rows, int64_t from, int64_t to, __m256i* out) {
    constexpr int64_t kRunBytes = CodeBytes<kBits>(kRun), kRunHigh = HighBytes<kBits>(kRun);
    constexpr int64_t kRunVectors = kRun / O::kSub * O::kSteps * 2;
    constexpr char kLift = static_cast<char>(kBits == 4 && !kAffine ? 0x88 : 0);
    const int64_t bytes = CodeBytes<kBits>(to - from);
    const uint8_t* codes[8];
    alignas(32) int32_t offsets[8];  // within the tile: less than 2 GB
    for (int r = 0; r < 8; ++r) {
      codes[r] = Codes<kBits>(w, rows[r], from);
      offsets[r] = static_cast<int32_t>((rows[r] - rows[0]) * HighBytes<kBits>(w.cols));
    }
    const uint8_t* high = High<kBits>(w, rows[0], from);
    for (int64_t at = 0; at < bytes; at += 32) {
      const bool half = at + 32 > bytes;
      __m256i raw[8];
      for (int r = 0; r < 8; ++r)
        raw[r] = half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + at)))
                      : LoadInts(codes[r] + at);
      Transpose(raw);
      for (int64_t run = 0; run < (half ? 16 : 32) / kRunBytes; ++run, high += kRunHigh, out += kRunVectors) {
        __m256i words[2];
        for (int64_t i = 0; i < kRunHigh / 4; ++i)
          words[i] = _mm256_i32gather_epi32(reinterpret_cast<const int*>(high + 4 * i), LoadInts(offsets), 1);
        Unpack(raw + run * (kRunBytes / 4), words, kLift, out, std::make_integer_sequence<int, kRunBytes / 4>());
      }
    }
  }

  template <int... i>
  static void Unpack(const __m256i* raw, const __m256i* words, char lift, __m256i* out, std::integer_sequence<int, i...>) {
    (O::template Unpack<i>(raw[i], words, lift, out), ...);
  }
};

}  // namespace

const KernelTable kProducts = TableOf<Few, Tile>({});

}  // namespace jaxchat::avx2
JAXCHAT_END
