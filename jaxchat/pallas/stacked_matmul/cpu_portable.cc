// x @ w.T for quantized and float weights on processors that no other source is for: the x86-64 baseline, NEON without
// dot products, anything else GCC and Clang know.
//
// Quantized weights: activations become 16-bit integers, one scale per 32 columns, and meet the codes as 16-bit
// integers. "Multiply, add neighbours" (pmaddwd) on those is exact, and every SIMD instruction set has it.
// Vectors are the compiler's (GCC's vector extension): arithmetic on them needs no intrinsics.
#define JAXCHAT_ISA JAXCHAT_PORTABLE
#include "../cpu_target.h"

#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::portable {
namespace {

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in lane i.
inline Ints MultiplyPairs(Shorts a, Shorts b) {
#if defined(__x86_64__)
  return Bits<Ints>(_mm_madd_epi16(Bits<__m128i>(a), Bits<__m128i>(b)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  const int16x8_t x = Bits<int16x8_t>(a), y = Bits<int16x8_t>(b);
  return Bits<Ints>(vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
#else
  Ints sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

// ---------------------------------------------------------------- a few rows of x

// Columns are taken in blocks. One vector of codes is several planes of 16-bit integers: plane p has the codes at
// bits [16 / planes * p, 16 / planes * (p + 1)) of each 16. Codes of 5 and 6 bits become bytes first.
template <int kBits>
struct Shape {
  static constexpr int64_t kSub = SubOf(kBits);
  static constexpr int kStored = kBits == 4 ? 4 : 8;                // bits of a code, as it is multiplied
  static constexpr int kPlanes = 16 / kStored;                      // in a vector
  static constexpr int64_t kColumns = kPlanes * kBytes / 2;         // in a vector
  static constexpr int64_t kBlock = std::max(kColumns, kSub);       // columns
  static constexpr int kVectors = kBlock / kColumns;                // in a block
  static constexpr int kSubs = kBlock / kSub;                       // in a block
};

// One block of one row of x, in the order in which the codes meet it.
template <int kBits>
struct alignas(kBytes) Block {
  Shorts q[Shape<kBits>::kVectors * Shape<kBits>::kPlanes];
  Floats scale;  // of each lane of the sums
  Floats sum;    // of a sub-group's values, once per sub-group
};

template <int kBits, bool kSigned>
inline Shorts Plane(UShorts codes, int p) {
  const int above = 16 - kBits * (p + 1);
  if constexpr (kSigned) return Bits<Shorts>(codes << above) >> (16 - kBits);
  return Bits<Shorts>((codes << above) >> (16 - kBits));
}

// Lane i of the result is values[sub-group of lane i].
template <int kBits>
inline Floats Spread(const float* values) {
  if constexpr (Shape<kBits>::kSubs == 1) return Floats{} + values[0];
  Floats v{};
  for (int i = 0; i < kLanes; ++i) v[i] = values[i * Shape<kBits>::kSubs / kLanes];
  return v;
}

// The codes of a run of 32 columns as they are multiplied, one a byte.
template <int kBits, bool kAffine>
inline void UnpackRun(const uint8_t* codes, const uint8_t* high, int8_t* out) {
  constexpr int kWide = kBits - 4, kFields = kWide > 0 ? 8 / kWide : 1, kLift = LiftOf(kBits, kAffine);
  for (int c = 0; c < kRun; ++c) {
    if constexpr (kBits == 8) {
      out[c] = static_cast<int8_t>(codes[c]);
    } else {
      int code = codes[c / 2] >> c % 2 * 4 & 15;
      const int k = c % 8 / 2, field = c / 8 * 2 + c % 2;  // see packing.py
      if constexpr (kBits > 4) code |= (high[field / kFields * 4 + k] >> field % kFields * kWide & ((1 << kWide) - 1)) << 4;
      if constexpr (kBits == 4 && !kAffine) code ^= kLift;  // two's complement
      out[c] = static_cast<int8_t>(code - kLift);
    }
  }
}

template <int kBits_, bool kAffine>
struct Few {
  static constexpr int kBits = kBits_;
  using S = Shape<kBits>;
  static constexpr int64_t kSub = S::kSub;
  using Block = portable::Block<kBits>;
  static constexpr int kMost = 4;
  static int64_t Blocks(const Weights& w) { return (w.cols + S::kBlock - 1) / S::kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    for (int64_t b = 0; b < Blocks(w); ++b, ++out) {
      float scales[S::kSubs];
      alignas(kBytes) int16_t q[S::kVectors * S::kPlanes][kBytes / 2];
      Floats sum{};
      for (int s = 0; s < S::kSubs; ++s) {
        const int64_t start = b * S::kBlock + s * kSub;
        const auto sub = Quantize<kSub>(x + start, w.inputs - start, 32767);
        scales[s] = sub.scale;
        sum[s * kLanes / S::kSubs] = sub.sum;
        for (int64_t c = 0; c < kSub; ++c) {
          const int64_t in_block = s * kSub + c, in_vector = in_block % S::kColumns;
          const int64_t plane = in_block / S::kColumns * S::kPlanes + in_vector % S::kPlanes;
          q[plane][in_vector / S::kPlanes] = static_cast<int16_t>(sub.At(c));
        }
      }
      std::memcpy(out->q, q, sizeof q);
      out->scale = Spread<kBits>(scales);
      out->sum = sum;
    }
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from_block, int64_t to, float* y) {
    const int64_t blocks = Blocks(w), subs = w.cols / kSub;
    const int64_t bytes = CodeBytes<kBits>(w.cols);
    constexpr int kBlockBytes = S::kVectors * kBytes;
    constexpr bool kSigned = !(kAffine && kBits == 4);  // affine 4-bit codes are 0 .. 15
    Floats acc[M] = {};
    for (int64_t b = from_block; b < to; ++b) {
      const uint8_t* from = Codes<kBits>(w, row, b * S::kBlock);
      uint8_t block[std::max<int64_t>(kBlockBytes, kRun)] = {};
      if constexpr (kBits == S::kStored) {
        if ((b + 1) * kBlockBytes > bytes)
          from = static_cast<const uint8_t*>(std::memcpy(block, from, bytes - b * kBlockBytes));
      } else {
        static_assert(kRun % S::kBlock == 0);
        const int64_t run = b * S::kBlock / kRun * kRun;
        UnpackRun<kBits, kAffine>(Codes<kBits>(w, row, run), High<kBits>(w, row, run), reinterpret_cast<int8_t*>(block));
        from = block + b * S::kBlock % kRun;
      }
      Ints sum[M] = {};
      for (int v = 0; v < S::kVectors; ++v) {
        const UShorts raw = Load<UShorts>(from + v * kBytes);
        for (int p = 0; p < S::kPlanes; ++p) {
          const Shorts plane = Plane<S::kStored, kSigned>(raw, p);
          for (int m = 0; m < M; ++m) sum[m] += MultiplyPairs(plane, x[m * blocks + b].q[v * S::kPlanes + p]);
        }
      }
      float scale[S::kSubs], min[S::kSubs];
      for (int s = 0; s < S::kSubs; ++s) {
        const int64_t sub = std::min(b * S::kSubs + s, subs - 1);  // beyond the last, x is zero
        scale[s] = scales.At(row, sub);
        if constexpr (kAffine) min[s] = mins.At(row, sub);
      }
      const Floats spread = Spread<kBits>(scale);
      for (int m = 0; m < M; ++m) {
        acc[m] += ToFloats(sum[m]) * (spread * x[m * blocks + b].scale);
        if constexpr (kAffine) acc[m] += Spread<kBits>(min) * x[m * blocks + b].sum;
      }
    }
    for (int m = 0; m < M; ++m) Put(Sum(acc[m]), from_block, y + m * w.rows + row);
  }
};

// ---------------------------------------------------------------- many rows of x

// A tile is pairs of 16-bit integers, [step][row][2 columns]: lanes are weight rows, and x's pair is broadcast.
template <int kBits_, bool kAffine_>
struct Tile {
  using Code = int16_t;
  using Input = int16_t;
  static constexpr int kBits = kBits_;
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kSub = SubOf(kBits), kRows = 2 * kLanes, kPart = int64_t{1} << 32, kPanel = 1;
  static constexpr int kMost = 4, kLevels = 32767, kInputs = kSub, kCodes = kSub;
  static constexpr int kSteps = kSub / 2;

  static int32_t Prepare(const Quantized<kSub>& x, int64_t, int16_t* out) {
    for (int64_t c = 0; c < kSub; ++c) out[c] = static_cast<int16_t>(x.At(c));
    return 0;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, int16_t* out) {
    for (int64_t r = 0; r < kRows; ++r) {
      int16_t* pair = out + 2 * r;
      for (int64_t column = from; column < to; column += kRun) {
        int8_t codes[kRun];
        UnpackRun<kBits, kAffine>(Codes<kBits>(w, rows[r], column), High<kBits>(w, rows[r], column), codes);
        for (int c = 0; c < kRun; c += 2, pair += 2 * kRows) {
          pair[0] = codes[c];
          pair[1] = codes[c + 1];
        }
      }
    }
  }

  template <int M>
  static void Products(const int16_t* codes, const int16_t* x, int64_t stride, const int32_t*, Ints (&sums)[M][2]) {
    for (auto& row : sums) row[0] = row[1] = Ints{};
    for (int j = 0; j < kSteps; ++j, codes += 2 * kRows) {
      const Shorts weights[2] = {Load<Shorts>(codes), Load<Shorts>(codes + 2 * kLanes)};
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, x + m * stride + 2 * j, sizeof pair);
        const Shorts inputs = Bits<Shorts>(Ints{} + pair);
        for (int v = 0; v < 2; ++v) sums[m][v] += MultiplyPairs(weights[v], inputs);
      }
    }
  }
};

}  // namespace

const KernelTable kProducts = TableOf<Few, Tile>({});

}  // namespace jaxchat::portable
JAXCHAT_END
