// x @ w.T for quantized weights on ARM processors with dot products of bytes (Armv8.2 DotProd: Cortex-A76, Neoverse N1,
// Apple M1 and later). Compiled once more for those that multiply 2x8 by 8x2 matrices of bytes (I8MM: Neoverse V1,
// Apple M2 and later), where many rows of x are multiplied that way.
//
// Few rows of x: weights of 4 to 6 bits meet activations of 8 bits; 8-bit weights 15 bits, split into two signed bytes,
// q = 128 h + l. Many rows: a register tile of eight weight rows, and 8 bits.
#pragma once
#include "../cpu_target.h"
#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

constexpr int64_t kBlock = 128;           // columns that few rows take at a time
constexpr int64_t kRuns = kBlock / kRun;  // runs in them: their scales fill a vector

int8x16_t LoadBytes(const void* from) { return vld1q_s8(static_cast<const int8_t*>(from)); }

// The scales (or minimums) of four sub-groups; zero beyond the last of a row, `subs`.
inline float32x4_t FourScales(const Groups& groups, int64_t row, int64_t sub, int64_t subs) {
  const int64_t left = subs - sub;
  if (groups.plain() && left >= 4)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(groups.Plain(row, sub))));
  if (groups.integers() && left >= 4) {  // 128 columns have one outer scale
    const Ints four = WidenBytes(groups.Integers(row, sub));
    return vmulq_n_f32(vcvtq_f32_s32(Bits<int32x4_t>(four)), Half(*groups.Outer(row, sub)));
  }
  Floats four{};
  for (int64_t i = 0; i < std::min<int64_t>(4, left); ++i) four[i] = groups.At(row, sub + i);
  return Bits<float32x4_t>(four);
}

// Bits above the fourth of a run's even columns (i = 0) or odd ones, in their places: see packing.py.
template <int kBits, int i>
inline uint8x16_t HighBits(const uint8_t* high) {
  constexpr int32_t kShifts[2][4] = {{4 - i, 2 - i, -i, -2 - i}, {4 - 2 * i, -2 * i, 4 - 2 * i, -2 * i}};
  uint32_t words[kBits - 4];
  std::memcpy(words, high, sizeof words);
  const uint32x4_t four =
      kBits == 5 ? vdupq_n_u32(words[0]) : vcombine_u32(vdup_n_u32(words[0]), vdup_n_u32(words[kBits - 5]));
  return vandq_u8(vreinterpretq_u8_u32(vshlq_u32(four, vld1q_s32(kShifts[kBits - 5]))),
                  vdupq_n_u8(kBits == 5 ? 0x10 : 0x30));
}

// Codes below 8 bits of 32 columns as bytes: the even columns, then the odd ones.
template <int kBits, bool kAffine>
inline int8x16x2_t Unpack(int8x16_t raw, const uint8_t* high) {
  if constexpr (kBits == 4 && !kAffine) return {{vshrq_n_s8(vshlq_n_s8(raw, 4), 4), vshrq_n_s8(raw, 4)}};
  const uint8x16_t codes = vreinterpretq_u8_s8(raw);
  uint8x16_t even = vandq_u8(codes, vdupq_n_u8(15)), odd = vshrq_n_u8(codes, 4);
  if constexpr (kBits > 4) {
    const uint8x16_t lift = vdupq_n_u8(LiftOf(kBits, kAffine));
    even = vsubq_u8(vorrq_u8(even, HighBits<kBits, 0>(high)), lift);
    odd = vsubq_u8(vorrq_u8(odd, HighBits<kBits, 1>(high)), lift);
  }
  return {{vreinterpretq_s8_u8(even), vreinterpretq_s8_u8(odd)}};
}

// The place of a column among some that are unpacked together: 32, or half as many.
template <int kBits>
constexpr int64_t Place(int64_t column, int64_t columns) {
  return kBits == 8 ? column : column % 2 * (columns / 2) + column / 2;
}

// ---------------------------------------------------------------- a few rows of x

// One block of one row of x.
template <int kBits>
struct Block {
  static constexpr int64_t kSub = SubOf(kBits), kSubs = kBlock / kSub;
  static constexpr int kParts = kBits == 8 ? 2 : 1;  // bytes of an activation: 8-bit weights: high, low
  int8_t q[kRuns][kParts][kRun];                     // in the order of `Place`
  float scale[kSubs];
  float sum[kSubs];  // of the values, for affine weights
};

// The products of a run, in four sums: of 16 columns in two.
inline int32x4_t Products(int8x16x2_t w, const int8_t (&q)[1][kRun]) {
  return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.val[0], LoadBytes(q[0])), w.val[1], LoadBytes(q[0] + 16));
}

inline int32x4_t Products(int8x16x2_t w, const int8_t (&q)[2][kRun]) {
  const int32x4_t zero = vdupq_n_s32(0);
  const int32x4_t high = vdotq_s32(vdotq_s32(zero, w.val[0], LoadBytes(q[0])), w.val[1], LoadBytes(q[0] + 16));
  return vdotq_s32(vdotq_s32(vshlq_n_s32(high, 7), w.val[0], LoadBytes(q[1])), w.val[1], LoadBytes(q[1] + 16));
}

// Scales of a block, and minimums.
template <int kBits>
struct Factors {
  float32x4_t scale[Block<kBits>::kSubs / 4], min;
};

// Adds the products of a block to M sums.
template <int kBits, int M, bool kAffine>
inline void Step(const uint8_t* codes, const uint8_t* high, const Factors<kBits>& by, const Block<kBits>* x,
                 int64_t stride, float32x4_t* acc) {
  int8x16x2_t w[kRuns];
  for (int r = 0; r < kRuns; ++r) {
    if constexpr (kBits == 8)
      w[r] = {{LoadBytes(codes + r * 32), LoadBytes(codes + r * 32 + 16)}};
    else
      w[r] = Unpack<kBits, kAffine>(LoadBytes(codes + r * 16), high + r * HighBytes<kBits>(kRun));
  }
  for (int m = 0; m < M; ++m) {
    const Block<kBits>& block = x[m * stride];
    int32x4_t sum[kRuns];
    for (int r = 0; r < kRuns; ++r) sum[r] = Products(w[r], block.q[r]);
    int32x4_t total[2] = {vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3])};
    if constexpr (Block<kBits>::kSubs == 4) total[0] = vpaddq_s32(total[0], total[1]);  // a lane a sub-group
    for (int i = 0; i < Block<kBits>::kSubs / 4; ++i)
      acc[m] = vfmaq_f32(acc[m], vcvtq_f32_s32(total[i]), vmulq_f32(by.scale[i], vld1q_f32(block.scale + 4 * i)));
    if constexpr (kAffine) acc[m] = vfmaq_f32(acc[m], by.min, vld1q_f32(block.sum));
  }
}

template <int kBits_, bool kAffine>
struct Few {
  static constexpr int kBits = kBits_;
  using Block = JAXCHAT_NAMESPACE::Block<kBits>;
  static constexpr int kMost = 4;

  static int64_t Blocks(const Weights& w) { return (w.cols + kBlock - 1) / kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    constexpr bool kSplit = Block::kParts == 2;
    constexpr int64_t kSub = Block::kSub;
    for (int64_t b = 0; b < Blocks(w); ++b)
      for (int64_t s = 0; s < Block::kSubs; ++s) {
        const int64_t in_block = s * kSub, start = b * kBlock + in_block, run = in_block / kRun;
        const auto sub = Quantize<kSub>(x + start, w.inputs - start, kSplit ? 16256 : 127);
        out[b].scale[s] = sub.scale;
        out[b].sum[s] = sub.sum;
        for (int64_t c = 0; c < kSub; ++c) {
          const int32_t q = sub.At(c), high = (q + 64) >> 7;
          const int64_t place = Place<kBits>(in_block % kRun + c, kRun);
          out[b].q[run][0][place] = static_cast<int8_t>(kSplit ? high : q);
          if constexpr (kSplit) out[b].q[run][1][place] = static_cast<int8_t>(q - (high << 7));
        }
      }
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    constexpr int64_t kBytes = CodeBytes<kBits>(kBlock), kHighBytes = HighBytes<kBits>(kBlock);
    const int64_t bytes = CodeBytes<kBits>(w.cols), subs = w.cols / Block::kSub;
    const uint8_t *codes = Codes<kBits>(w, row), *high = High<kBits>(w, row);
    float32x4_t acc[M];
    for (int m = 0; m < M; ++m) acc[m] = vdupq_n_f32(0);
    for (int64_t b = from; b < to; ++b) {
      const uint8_t *at = codes + b * kBytes, *high_at = high + b * kHighBytes;
      uint8_t last[kBytes] = {}, last_high[kHighBytes + 1] = {};
      if ((b + 1) * kBytes > bytes) {
        at = static_cast<const uint8_t*>(std::memcpy(last, at, bytes - b * kBytes));
        if constexpr (kHighBytes > 0) {
          const int64_t left = HighBytes<kBits>(w.cols) - b * kHighBytes;
          high_at = static_cast<const uint8_t*>(std::memcpy(last_high, high_at, left));
        }
      } else {
        Prefetch<kBytes>(at);
        if constexpr (kHighBytes > 0) Prefetch<kHighBytes>(high_at);
      }
      Factors<kBits> by;
      for (int64_t i = 0; i < Block::kSubs / 4; ++i) by.scale[i] = FourScales(scales, row, b * Block::kSubs + 4 * i, subs);
      if constexpr (kAffine) by.min = FourScales(mins, row, b * kRuns, subs);
      Step<kBits, M, kAffine>(at, high_at, by, x + b, Blocks(w), acc);
    }
    for (int m = 0; m < M; ++m) Put(vaddvq_f32(acc[m]), from, y + m * w.rows + row);
  }
};

// ---------------------------------------------------------------- many rows of x

constexpr int64_t kTileRows = 8;  // weight rows in a register tile
constexpr int64_t kInputRows = 4;  // of x in a register tile

#if JAXCHAT_ISA == JAXCHAT_I8MM
// A vector is eight columns of two rows, of x as of the weights; their product is two by two sums.
constexpr int64_t kPerVector = 2;
#else
// A vector is four columns of four weight rows, or of x sixteen columns of one row: lane by lane they meet the weights.
constexpr int64_t kPerVector = 4;
#endif
constexpr int64_t kWidth = 16 / kPerVector;            // columns in a vector of weights
constexpr int64_t kHalfSteps = 16 / kWidth;            // in 16 columns
constexpr int64_t kVectors = kTileRows / kPerVector;   // side by side

// Where the byte of a row and a place lies among those of a sub-group of four rows.
template <int64_t kSub>
constexpr int64_t PlaceInTile(int64_t row, int64_t place) {
  if (kPerVector == 4) return row * kSub + place;
  return (place / 8 * 2 + row / 2) * 16 + row % 2 * 8 + place % 8;
}

inline int8x16_t Interleave64(int8x16_t a, int8x16_t b, bool upper) {
  const int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
  return vreinterpretq_s8_s64(upper ? vtrn2q_s64(x, y) : vtrn1q_s64(x, y));
}

// Sixteen columns of eight rows to the tile's vectors, out[step][vector].
inline void PackVectors(const int8x16_t* rows, int8x16_t* out) {
#if JAXCHAT_ISA == JAXCHAT_I8MM
  for (int v = 0; v < kVectors; ++v)
    for (int j = 0; j < 2; ++j) out[j * kVectors + v] = Interleave64(rows[2 * v], rows[2 * v + 1], j);
#else
  for (int v = 0; v < kVectors; ++v) {
    int8x16_t even[2], odd[2];  // columns 0 to 3 and 8 to 11, 4 to 7 and 12 to 15 of two rows
    for (int i = 0; i < 2; ++i) {
      const int32x4_t a = vreinterpretq_s32_s8(rows[4 * v + 2 * i]), b = vreinterpretq_s32_s8(rows[4 * v + 2 * i + 1]);
      even[i] = vreinterpretq_s8_s32(vtrn1q_s32(a, b));
      odd[i] = vreinterpretq_s8_s32(vtrn2q_s32(a, b));
    }
    for (int j = 0; j < 2; ++j) {
      out[2 * j * kVectors + v] = Interleave64(even[0], even[1], j);
      out[(2 * j + 1) * kVectors + v] = Interleave64(odd[0], odd[1], j);
    }
  }
#endif
}

// The products of a sub-group of kInputRows rows of x and a tile.
#if JAXCHAT_ISA == JAXCHAT_I8MM
using Sums = int32x4_t[kInputRows / 2][kVectors];  // of two rows of x and two of the weights

template <int64_t kSub>
inline void AddProducts(const int8x16_t* w, const int8_t* x, Sums& sums) {
  for (int j = 0; j < kSub / kWidth; ++j)
    for (int m = 0; m < kInputRows / 2; ++m) {
      const int8x16_t inputs = LoadBytes(x + (j * 2 + m) * 16);
      for (int v = 0; v < kVectors; ++v) sums[m][v] = vmmlaq_s32(sums[m][v], inputs, w[j * kVectors + v]);
    }
}

// The eight weight rows' sums of row m of x, as two vectors.
inline int32x4_t RowOf(const Sums& sums, int m, int v) {
  const int64x2_t a = vreinterpretq_s64_s32(sums[m / 2][2 * v]), b = vreinterpretq_s64_s32(sums[m / 2][2 * v + 1]);
  return vreinterpretq_s32_s64(m % 2 ? vtrn2q_s64(a, b) : vtrn1q_s64(a, b));
}
#else
using Sums = int32x4_t[kInputRows][kVectors];  // of one row of x and four of the weights

template <int kLane>
inline void AddLane(const int8x16_t* w, const int8x16_t* x, Sums& sums) {
  for (int m = 0; m < kInputRows; ++m)
    for (int v = 0; v < kVectors; ++v) sums[m][v] = vdotq_laneq_s32(sums[m][v], w[kLane * kVectors + v], x[m], kLane);
}

template <int64_t kSub>
inline void AddProducts(const int8x16_t* w, const int8_t* x, Sums& sums) {
  for (int half = 0; half < kSub / 16; ++half, w += 4 * kVectors) {
    int8x16_t inputs[kInputRows];
    for (int m = 0; m < kInputRows; ++m) inputs[m] = LoadBytes(x + m * kSub + half * 16);
    AddLane<0>(w, inputs, sums);
    AddLane<1>(w, inputs, sums);
    AddLane<2>(w, inputs, sums);
    AddLane<3>(w, inputs, sums);
  }
}

inline int32x4_t RowOf(const Sums& sums, int m, int v) { return sums[m][v]; }
#endif

// [step][vector] of bytes; of x four rows, a sub-group of each.
template <int kBits_, bool kAffine_>
struct Tile {
  using Code = int8_t;
  using Input = int8_t;
  static constexpr int kBits = kBits_;
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kSub = SubOf(kBits), kRows = kTileRows, kPanel = kInputRows;
  static constexpr int64_t kPart = 2048;  // 16 KB, which stay in the first-level cache
  static constexpr int kMost = kInputRows, kLevels = 127, kInputs = kSub, kCodes = kSub;

  static int32_t Prepare(const Quantized<kSub>& x, int64_t lane, int8_t* panel) {
    for (int64_t c = 0; c < kSub; ++c)
      panel[PlaceInTile<kSub>(lane, Place<kBits>(c, kSub))] = static_cast<int8_t>(x.At(c));
    return 0;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int8_t* out) {
    auto* vectors = reinterpret_cast<int8x16_t*>(out);
    for (int64_t column = from; column < to; column += kRun) {
      int8x16_t half[2][kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int8x16x2_t both = Halves32(Codes<kBits>(w, rows[r], column), High<kBits>(w, rows[r], column));
        half[0][r] = both.val[0];
        half[1][r] = both.val[1];
      }
      for (int i = 0; i < 2; ++i, vectors += kHalfSteps * kVectors) PackVectors(half[i], vectors);
    }
  }

  template <int M>
  static void Products(const int8_t* codes, const int8_t* x, int64_t, const int32_t*, Ints (&out)[M][2]) {
    Sums sums = {};
    AddProducts<kSub>(reinterpret_cast<const int8x16_t*>(codes), x, sums);
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < 2; ++v) out[r][v] = Bits<Ints>(RowOf(sums, r, v));
  }

 private:
  // Two vectors of a run, in the order of `Place`: of a sub-group of 32, or one of 16 each.
  static int8x16x2_t Halves32(const uint8_t* codes, const uint8_t* high) {
    if constexpr (kBits == 8) return {{LoadBytes(codes), LoadBytes(codes + 16)}};
    const int8x16x2_t both = Unpack<kBits, kAffine>(LoadBytes(codes), high);
    if constexpr (kSub == kRun) return both;
    return {{Interleave64(both.val[0], both.val[1], false), Interleave64(both.val[0], both.val[1], true)}};
  }
};

}  // namespace

const KernelTable kProducts = TableOf<Few, Tile>({});

}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
