// What the kernels of all instruction sets share: float weights, activations as integers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_blocks.h"
#include "cpu_kernels.h"
#include "../cpu_vectors.h"

namespace jaxchat {
namespace {

// float16 bits -> float32. In integers except for subnormals, whose offset trick also works where the thread
// flushes float32 subnormals to zero.
inline Floats WidenHalf(Halves half) {
#if defined(__AVX512F__)
  return Bits<Floats>(_mm512_cvtph_ps(Bits<__m256i>(half)));
#elif defined(__AVX2__)
  return Bits<Floats>(_mm256_cvtph_ps(Bits<__m128i>(half)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return Bits<Floats>(vcvt_f32_f16(Bits<float16x4_t>(half)));
#else
  const Ints h = __builtin_convertvector(half, Ints);
  const Ints exponent = h & 0x7c00, shifted = (h & 0x7fff) << 13;
  const Ints normal = shifted + (112 << 23) + (exponent == 0x7c00 ? Ints{} + (112 << 23) : Ints{});
  const Floats small = Bits<Floats>(shifted + (113 << 23)) - 0x1p-14f;
  const Ints magnitude = exponent == 0 ? Bits<Ints>(small) : normal;
  return Bits<Floats>(magnitude | (h & 0x8000) << 16);
#endif
}

inline float LoadScale(const void* scales, int64_t i, bool wide) {
  if (wide) return static_cast<const float*>(scales)[i];
  return WidenHalf(Halves{static_cast<const uint16_t*>(scales)[i]})[0];
}

// Asks for weights that are read soon. Rows follow each other: what is next lies ahead also where a row ends.
template <int64_t kBytesRead>
inline void Prefetch(const void* weights) {
  constexpr int64_t kAhead = kBytes == 64 ? 4096 : 1024;
  for (int64_t i = 0; i < kBytesRead; i += 64) __builtin_prefetch(static_cast<const char*>(weights) + kAhead + i);
}

// ---------------------------------------------------------------- float weights, a few rows of x

// What one step takes: columns of the weights as vectors of floats, which meet as many vectors of x.
template <Kind kind>
struct FloatVectors {
  static constexpr int kCount = 1;
  Floats values[1];
  explicit FloatVectors(const void* from) {
    if constexpr (kind == Kind::kF32)
      values[0] = Load<Floats>(from);
    else
      values[0] = WidenHalf(Load<Halves>(from));
  }
};

// A bfloat16 is the upper half of a float32. Of a vector of 32 bits, the lower halves are the even columns, and the
// upper ones, the others cleared, the odd ones: `SplitEvenOdd` gives x that order.
template <>
struct FloatVectors<Kind::kBf16> {
  static constexpr int kCount = 2;
  Floats values[2];
  explicit FloatVectors(const void* from) {
    const Ints pairs = Load<Ints>(from);
    values[0] = Bits<Floats>(pairs << 16);
    values[1] = Bits<Floats>(pairs & -65536);
  }
};

constexpr int64_t kSplitColumns = 2 * kLanes;

int64_t SplitColumns(int64_t columns) { return (columns + kSplitColumns - 1) / kSplitColumns * kSplitColumns; }

// [m, n] -> [m, SplitColumns(n)]: of each 2 kLanes columns the even ones, then the odd ones; zeros behind.
void SplitEvenOdd(const float* x, int64_t m, int64_t n, float* out) {
  const auto split = [&out](const float* from) {
    for (int c = 0; c < kLanes; ++c) {
      out[c] = from[2 * c];
      out[kLanes + c] = from[2 * c + 1];
    }
    out += kSplitColumns;
  };
  for (int64_t i = 0; i < m; ++i, x += n) {
    int64_t k = 0;
    for (; k + kSplitColumns <= n; k += kSplitColumns) split(x + k);
    if (k == n) continue;
    float last[kSplitColumns] = {};
    std::memcpy(last, x + k, (n - k) * sizeof(float));
    split(last);
  }
}

// M rows of x, `stride` floats apart, times one row of weights.
template <Kind kind, int M>
void FloatRow(const Weights& w, const float* x, int64_t stride, int64_t row, float* y) {
  using Vectors = FloatVectors<kind>;
  constexpr int kUnroll = 4;  // independent sums: one would wait for its own last addition
  constexpr int kWidth = kind == Kind::kF32 ? 4 : 2;
  constexpr int kStep = Vectors::kCount * kLanes;  // columns
  const int64_t n = w.inputs;
  const char* from = static_cast<const char*>(w.codes) + row * w.cols * kWidth;
  Floats acc[M][kUnroll] = {};
  const auto add = [&](const char* weights, const float* inputs, int64_t inputs_stride, int u) {
    const Vectors v(weights);
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < Vectors::kCount; ++c)
        acc[m][u] += v.values[c] * Load<Floats>(inputs + m * inputs_stride + c * kLanes);
  };
  int64_t k = 0;
  for (; k + kUnroll * kStep <= n; k += kUnroll * kStep) {
    Prefetch<kUnroll * kStep * kWidth>(from + k * kWidth);
    for (int u = 0; u < kUnroll; ++u) add(from + (k + u * kStep) * kWidth, x + k + u * kStep, stride, u);
  }
  for (; k < n; k += kStep) {  // the rest; zeros stand beyond the end
    const int64_t left = std::min<int64_t>(kStep, n - k);
    char weights[kStep * kWidth] = {};
    float inputs[M * kStep] = {};
    std::memcpy(weights, from + k * kWidth, left * kWidth);
    // Split x has its own zeros.
    for (int m = 0; m < M; ++m)
      std::memcpy(inputs + m * kStep, x + m * stride + k, (kind == Kind::kBf16 ? kStep : left) * sizeof(float));
    add(weights, inputs, kStep, 0);
  }
  for (int m = 0; m < M; ++m) y[m * w.rows + row] = Sum((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
}

// Calls work.template operator()<M>(i) for rows i.. of x, up to kMost at a time, until all m are done.
template <int kMost, typename Work>
void InSteps(int64_t m, const Work& work) {
  int64_t i = 0;
  for (; i + kMost <= m; i += kMost) work(std::integral_constant<int, kMost>(), i);
  if constexpr (kMost > 1) InSteps<kMost - 1>(m - i, [&](auto count, int64_t j) { work(count, i + j); });
}

template <Kind kind>
void FloatRows(const Weights& w, const float* x, int64_t stride, int64_t m, float* y, int64_t begin, int64_t end) {
  constexpr int kMost = kBytes == 64 ? 4 : 2;  // AVX-512 has twice as many registers
  for (int64_t row = begin; row < end; ++row)
    InSteps<kMost>(m, [&](auto count, int64_t i) {
      FloatRow<kind, decltype(count)::value>(w, x + i * stride, stride, row, y + i * w.rows);
    });
}

int64_t FloatBytes(const Weights& w, int64_t m) {
  return w.kind == Kind::kBf16 ? m * SplitColumns(w.inputs) * static_cast<int64_t>(sizeof(float)) : 0;
}

void FloatPrepare(const Weights& w, const float* x, int64_t m, void* out) {
  if (w.kind == Kind::kBf16) SplitEvenOdd(x, m, w.inputs, static_cast<float*>(out));
}

void AnyFloatRows(const Weights& w, const float* x, const void* prepared, int64_t m, float* y, int64_t begin,
                  int64_t end) {
  if (w.kind == Kind::kF32) return FloatRows<Kind::kF32>(w, x, w.inputs, m, y, begin, end);
  if (w.kind == Kind::kF16) return FloatRows<Kind::kF16>(w, x, w.inputs, m, y, begin, end);
  const auto* split = static_cast<const float*>(prepared);
  FloatRows<Kind::kBf16>(w, split, SplitColumns(w.inputs), m, y, begin, end);
}

// ---------------------------------------------------------------- activations as integers

constexpr int64_t kSub = 32;  // columns of x that share a scale, whatever the weights' group

// 32 activations as integers, with their scale and sums.
struct Quantized {
  Ints q[kSub / kLanes];
  int32_t total;  // of the integers
  float scale;
  float sum;  // of the values, for affine weights

  int32_t At(int64_t column) const { return q[column / kLanes][column % kLanes]; }
};

// Integers up to `steps`. `count` values are real, the others zero. NaN and infinity make the scale NaN.
inline Quantized Quantize(const float* from, int64_t count, float steps) {
  float padded[kSub] = {};
  if (count < kSub) {
    if (count > 0) std::memcpy(padded, from, count * sizeof(float));
    from = padded;
  }
  Ints top{}, total{};
  Floats sum{};
  for (int64_t i = 0; i < kSub; i += kLanes) {
    // Magnitudes compare like their bits, which puts NaN on top.
    const Ints magnitude = Load<Ints>(from + i) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    sum += Load<Floats>(from + i);
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, top[i]);
  const float largest = Bits<float>(bits);
  const bool finite = bits < 0x7f800000, nonzero = largest > 1e-30f;
  const float inverse = finite && nonzero ? steps / largest : 0.0f;
  Quantized out;
  for (int64_t i = 0; i < kSub / kLanes; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; NaN leaves some, and its scale is NaN.
    const Floats shifted = Load<Floats>(from + i * kLanes) * inverse + 12582912.0f;
    out.q[i] = (Bits<Ints>(shifted) & 0x7fffff) - 0x400000;
    total += out.q[i];
  }
  out.total = Sum(total);
  out.scale = !finite ? std::numeric_limits<float>::quiet_NaN() : nonzero ? largest / steps : 0.0f;
  out.sum = Sum(sum);
  return out;
}

// ---------------------------------------------------------------- quantized weights, a few rows of x

// The scales (or minimums) of a row of weights, one per 32 columns.
class Groups {
 public:
  Groups(const Weights& w, const void* values)
      : values_(values), wide_(w.wide_scales), per_row_(w.cols / w.group), shift_(0) {
    // Groups are 32, 64 or 128 columns, or the row.
    while (w.cols > w.group ? (kSub << shift_) < w.group : (w.cols / kSub) >> shift_ > 0) ++shift_;
  }
  // Whether there is a float16 for each 32 columns.
  bool plain() const { return shift_ == 0 && !wide_; }
  const uint16_t* Plain(int64_t row, int64_t sub) const {
    return static_cast<const uint16_t*>(values_) + row * per_row_ + sub;
  }
  float At(int64_t row, int64_t sub) const { return LoadScale(values_, row * per_row_ + (sub >> shift_), wide_); }

 private:
  const void* values_;
  bool wide_;
  int64_t per_row_;
  int shift_;
};

// A sum over columns from `from` on: added to what those before came to.
inline void Put(float sum, int64_t from, float* y) { *y = from > 0 ? *y + sum : sum; }

// What a table has for a few rows of x. Few<kind> says how it multiplies quantized weights:
//   kMost: rows of x that a row of weights meets at a time.
//   Block: some columns of a row of x, in the order in which the codes meet them; Blocks(w): how many a row has.
//   Prepare(w, x, rows, blocks): makes those of one row of x, of so many that meet the weights together.
//   Row<M, kAffine>(w, scales, mins, x, row, from, to, y): blocks [from, to) of M rows of x times a row of weights.
template <template <Kind> class Few>
struct FewRows {
  static int64_t Bytes(const Weights& w, int64_t m) {
    if (w.kind == Kind::kInt4) return m * Few<Kind::kInt4>::Blocks(w) * sizeof(typename Few<Kind::kInt4>::Block);
    if (w.kind == Kind::kInt8) return m * Few<Kind::kInt8>::Blocks(w) * sizeof(typename Few<Kind::kInt8>::Block);
    return FloatBytes(w, m);
  }

  static void Prepare(const Weights& w, const float* x, int64_t m, void* out) {
    if (w.kind == Kind::kInt4) return PrepareAll<Few<Kind::kInt4>>(w, x, m, out);
    if (w.kind == Kind::kInt8) return PrepareAll<Few<Kind::kInt8>>(w, x, m, out);
    FloatPrepare(w, x, m, out);
  }

  static void Rows(const Weights& w, const float* x, const void* prepared, int64_t m, float* y, int64_t begin,
                   int64_t end) {
    if (w.kind == Kind::kInt4) return Quantized<Few<Kind::kInt4>>(w, prepared, m, y, begin, end);
    if (w.kind == Kind::kInt8) return Quantized<Few<Kind::kInt8>>(w, prepared, m, y, begin, end);
    AnyFloatRows(w, x, prepared, m, y, begin, end);
  }

 private:
  template <typename Kernel>
  static void PrepareAll(const Weights& w, const float* x, int64_t m, void* out) {
    auto* blocks = static_cast<typename Kernel::Block*>(out);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t rows = i < m / Kernel::kMost * Kernel::kMost ? Kernel::kMost : m % Kernel::kMost;
      Kernel::Prepare(w, x + i * w.inputs, rows, blocks + i * Kernel::Blocks(w));
    }
  }

  template <typename Kernel>
  static void Quantized(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
    const auto rows = w.mins ? QuantizedRows<Kernel, true> : QuantizedRows<Kernel, false>;
    rows(w, prepared, m, y, begin, end);
  }

  template <typename Kernel, bool kAffine>
  static void QuantizedRows(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
    using Block = typename Kernel::Block;
    const auto* x = static_cast<const Block*>(prepared);
    const int64_t blocks = Kernel::Blocks(w);
    const Groups scales(w, w.scales), mins(w, w.mins);
    const auto visit = [&](auto count, int64_t i, int64_t row, int64_t from, int64_t to) {
      constexpr int kCount = decltype(count)::value;
      Kernel::template Row<kCount, kAffine>(w, scales, mins, x + i * blocks, row, from, to, y + i * w.rows);
    };
    ForRowsInBlocks<Kernel::kMost>(m, begin, end, blocks, sizeof(Block), visit);
  }
};

}  // namespace
}  // namespace jaxchat
