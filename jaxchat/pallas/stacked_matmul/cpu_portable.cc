// x @ w.T for quantized and float weights on processors that no other source is for: the x86-64 baseline, NEON without
// dot products, anything else GCC and Clang know.
//
// Quantized weights: activations become 16-bit integers, one scale per 32 columns, and meet the codes as 16-bit
// integers. "Multiply, add neighbours" (pmaddwd) on those is exact, and every SIMD instruction set has it.
// Vectors are the compiler's (GCC's vector extension): arithmetic on them needs no intrinsics.
#include "cpu_common.h"

namespace jaxchat {
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

// ---------------------------------------------------------------- quantized weights, a few rows of x

// Columns are taken in blocks. One vector of codes is several planes of 16-bit integers: plane p has the codes at
// bits [16 / planes * p, 16 / planes * (p + 1)) of each 16.
template <Kind kind>
struct Shape {
  static constexpr int kPlanes = kind == Kind::kInt4 ? 4 : 2;       // in a vector
  static constexpr int64_t kColumns = kPlanes * kBytes / 2;         // in a vector
  static constexpr int64_t kBlock = std::max(kColumns, kSub);       // columns
  static constexpr int kVectors = kBlock / kColumns;                // in a block
  static constexpr int kSubs = kBlock / kSub;                       // in a block
};

// One block of one row of x, in the order in which the codes meet it.
template <Kind kind>
struct alignas(kBytes) Block {
  Shorts q[Shape<kind>::kVectors * Shape<kind>::kPlanes];
  Floats scale;  // of each lane of the sums
  Floats sum;    // of a sub-group's values, once per sub-group
};

template <Kind kind, bool kSigned>
inline Shorts Plane(UShorts codes, int p) {
  constexpr int kBits = 16 / Shape<kind>::kPlanes;
  const int above = 16 - kBits * (p + 1);
  if constexpr (kSigned) return Bits<Shorts>(codes << above) >> (16 - kBits);
  return Bits<Shorts>((codes << above) >> (16 - kBits));
}

// Lane i of the result is values[sub-group of lane i].
template <Kind kind>
inline Floats Spread(const float* values) {
  if constexpr (Shape<kind>::kSubs == 1) return Floats{} + values[0];
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = values[i * Shape<kind>::kSubs / kLanes];
  return v;
}

template <Kind kind>
struct Few {
  using S = Shape<kind>;
  using Block = jaxchat::Block<kind>;
  static constexpr int kMost = 4;
  static int64_t Blocks(const Weights& w) { return (w.cols + S::kBlock - 1) / S::kBlock; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    for (int64_t b = 0; b < Blocks(w); ++b, ++out) {
      float scales[S::kSubs];
      alignas(kBytes) int16_t q[S::kVectors * S::kPlanes][kBytes / 2];
      Floats sum{};
      for (int s = 0; s < S::kSubs; ++s) {
        const int64_t start = b * S::kBlock + s * kSub;
        const Quantized sub = Quantize(x + start, w.inputs - start, 32767);
        scales[s] = sub.scale;
        sum[s * kLanes / S::kSubs] = sub.sum;
        for (int64_t c = 0; c < kSub; ++c) {
          const int64_t in_block = s * kSub + c, in_vector = in_block % S::kColumns;
          const int64_t plane = in_block / S::kColumns * S::kPlanes + in_vector % S::kPlanes;
          q[plane][in_vector / S::kPlanes] = static_cast<int16_t>(sub.At(c));
        }
      }
      std::memcpy(out->q, q, sizeof q);
      out->scale = Spread<kind>(scales);
      out->sum = sum;
    }
  }

  template <int M, bool kAffine>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from_block, int64_t to, float* y) {
    const int64_t blocks = Blocks(w), subs = w.cols / kSub;
    const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols;
    constexpr int kBlockBytes = S::kVectors * kBytes;
    constexpr bool kSigned = !(kAffine && kind == Kind::kInt4);  // affine 4-bit codes are 0 .. 15
    const auto* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    Floats acc[M] = {};
    for (int64_t b = from_block; b < to; ++b) {
      const uint8_t* from = codes + b * kBlockBytes;
      uint8_t last[kBlockBytes];
      if ((b + 1) * kBlockBytes > bytes) {
        std::memset(last, 0, sizeof last);
        std::memcpy(last, from, bytes - b * kBlockBytes);
        from = last;
      }
      Ints sum[M] = {};
      for (int v = 0; v < S::kVectors; ++v) {
        const UShorts raw = Load<UShorts>(from + v * kBytes);
        for (int p = 0; p < S::kPlanes; ++p) {
          const Shorts plane = Plane<kind, kSigned>(raw, p);
          for (int m = 0; m < M; ++m) sum[m] += MultiplyPairs(plane, x[m * blocks + b].q[v * S::kPlanes + p]);
        }
      }
      float scale[S::kSubs], min[S::kSubs];
      for (int s = 0; s < S::kSubs; ++s) {
        const int64_t sub = std::min(b * S::kSubs + s, subs - 1);  // beyond the last, x is zero
        scale[s] = scales.At(row, sub);
        if constexpr (kAffine) min[s] = mins.At(row, sub);
      }
      const Floats spread = Spread<kind>(scale);
      for (int m = 0; m < M; ++m) {
        acc[m] += ToFloats(sum[m]) * (spread * x[m * blocks + b].scale);
        if constexpr (kAffine) acc[m] += Spread<kind>(min) * x[m * blocks + b].sum;
      }
    }
    for (int m = 0; m < M; ++m) Put(Sum(acc[m]), from_block, y + m * w.rows + row);
  }
};

// ---------------------------------------------------------------- quantized weights, many rows of x

// A tile of weight rows is unpacked once to pairs of 16-bit integers and then meets all of x from the cache:
// lanes are weight rows, each step is two columns, and x's pair is broadcast.
constexpr int kVectors = 2;
constexpr int64_t kTileRows = kVectors * kLanes;
constexpr int kSteps = kSub / 2;

// Prepared x: q [m, cols], then scale and sum [m, cols / 32].
struct TiledX {
  int16_t* q;
  float* scale;
  float* sum;
};

int64_t TiledBytes(const Weights& w, int64_t m) { return m * (w.cols * 2 + w.cols / kSub * 8); }

TiledX TiledView(const Weights& w, void* prepared, int64_t m) {
  auto* q = static_cast<int16_t*>(prepared);
  auto* scale = reinterpret_cast<float*>(q + m * w.cols);
  return {q, scale, scale + m * (w.cols / kSub)};
}

void TiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  const TiledX view = TiledView(w, out, m);
  const int64_t subs = w.cols / kSub;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t s = 0; s < subs; ++s) {
      const Quantized sub = Quantize(x + i * w.inputs + s * kSub, w.inputs - s * kSub, 32767);
      int16_t* q = view.q + i * w.cols + s * kSub;
      for (int64_t c = 0; c < kSub; ++c) q[c] = static_cast<int16_t>(sub.At(c));
      view.scale[i * subs + s] = sub.scale;
      view.sum[i * subs + s] = sub.sum;
    }
}

// Pairs of codes [sub-group][step][row][2 columns], scales and minimums [sub-group][row].
struct Tile {
  int16_t* codes;
  float* scale;
  float* min;
};

int64_t TiledScratchBytes(const Weights& w) { return kTileRows * (w.cols * 2 + w.cols / kSub * 8); }

Tile TileView(const Weights& w, void* scratch) {
  auto* codes = static_cast<int16_t*>(scratch);
  auto* scale = reinterpret_cast<float*>(codes + kTileRows * w.cols);
  return {codes, scale, scale + kTileRows * (w.cols / kSub)};
}

template <Kind kind, bool kAffine>
void Pack(const Weights& w, int64_t begin, const Tile& tile) {
  const int64_t subs = w.cols / kSub, bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols;
  const Groups scales(w, w.scales), mins(w, w.mins);
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t row = std::min(begin + r, w.rows - 1);  // past the end: repeat the last, store nothing
    const auto* from = static_cast<const uint8_t*>(w.codes) + row * bytes;
    for (int64_t s = 0; s < subs; ++s) {
      int16_t* out = tile.codes + s * kSub * kTileRows + r * 2;
      for (int j = 0; j < kSteps; ++j, out += 2 * kTileRows) {
        if constexpr (kind == Kind::kInt8) {
          out[0] = static_cast<int8_t>(*from++);
          out[1] = static_cast<int8_t>(*from++);
        } else {
          const int byte = *from++;
          out[0] = kAffine ? byte & 15 : static_cast<int8_t>(byte << 4) >> 4;
          out[1] = kAffine ? byte >> 4 : static_cast<int8_t>(byte) >> 4;
        }
      }
      tile.scale[s * kTileRows + r] = scales.At(row, s);
      if constexpr (kAffine) tile.min[s * kTileRows + r] = mins.At(row, s);
    }
  }
}

template <int M, bool kAffine>
void Multiply(const Weights& w, const TiledX& x, const Tile& tile, int64_t i, float* y, int64_t begin,
              int64_t end) {
  const int64_t subs = w.cols / kSub;
  Floats acc[M][kVectors] = {};
  for (int64_t s = 0; s < subs; ++s) {
    Ints sum[M][kVectors] = {};
    const int16_t* codes = tile.codes + s * kSub * kTileRows;
    for (int j = 0; j < kSteps; ++j, codes += 2 * kTileRows) {
      Shorts weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = Load<Shorts>(codes + v * 2 * kLanes);
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, x.q + (i + m) * w.cols + s * kSub + 2 * j, sizeof pair);
        const Shorts inputs = Bits<Shorts>(Ints{} + pair);
        for (int v = 0; v < kVectors; ++v) sum[m][v] += MultiplyPairs(weights[v], inputs);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = s * kTileRows + v * kLanes;
        acc[m][v] += ToFloats(sum[m][v]) * (Load<Floats>(tile.scale + at) * x.scale[(i + m) * subs + s]);
        if constexpr (kAffine) acc[m][v] += Load<Floats>(tile.min + at) * x.sum[(i + m) * subs + s];
      }
  }
  for (int m = 0; m < M; ++m) {
    float out[kTileRows];
    for (int v = 0; v < kVectors; ++v) Store(out + v * kLanes, acc[m][v]);
    std::memcpy(y + (i + m) * w.rows + begin, out, std::min(kTileRows, end - begin) * sizeof(float));
  }
}

template <Kind kind, bool kAffine>
void TiledRows(const Weights& w, const TiledX& x, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const Tile tile = TileView(w, scratch);
  for (int64_t row = begin; row < end; row += kTileRows) {
    Pack<kind, kAffine>(w, row, tile);
    InSteps<4>(m, [&](auto count, int64_t i) {
      Multiply<decltype(count)::value, kAffine>(w, x, tile, i, y, row, end);
    });
  }
}

void Tiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const TiledX x = TiledView(w, const_cast<void*>(prepared), m);
  if (w.kind == Kind::kInt4) {
    if (w.mins) return TiledRows<Kind::kInt4, true>(w, x, m, y, begin, end, scratch);
    return TiledRows<Kind::kInt4, false>(w, x, m, y, begin, end, scratch);
  }
  if (w.mins) return TiledRows<Kind::kInt8, true>(w, x, m, y, begin, end, scratch);
  return TiledRows<Kind::kInt8, false>(w, x, m, y, begin, end, scratch);
}

}  // namespace

const Kernels& PortableKernels() {
  static constexpr Kernels kernels = {"portable", FewRows<Few>::Bytes, FewRows<Few>::Prepare, FewRows<Few>::Rows,
                                      TiledBytes, TiledPrepare, Tiled,      TiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
