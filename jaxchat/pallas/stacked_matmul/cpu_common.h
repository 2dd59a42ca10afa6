// What the kernels for processors without AVX-512 share: float weights, activations as integers.
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
#if defined(__AVX2__)
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

// ---------------------------------------------------------------- float weights, a few rows of x

template <Kind kind>
inline Floats LoadFloats(const void* codes, int64_t i) {
  if constexpr (kind == Kind::kF32) return Load<Floats>(static_cast<const float*>(codes) + i);
  const Halves half = Load<Halves>(static_cast<const uint16_t*>(codes) + i);
  if constexpr (kind == Kind::kF16) return WidenHalf(half);
  return WidenBfloat16(half);
}

template <Kind kind, int M>
void FloatRow(const Weights& w, const float* x, int64_t row, float* y) {
  constexpr int kUnroll = 4;  // independent sums: one would wait for its own last addition
  constexpr int kWidth = kind == Kind::kF32 ? 4 : 2;
  const int64_t n = w.inputs;
  const char* from = static_cast<const char*>(w.codes) + row * w.cols * kWidth;
  Floats acc[M][kUnroll] = {};
  int64_t k = 0;
  for (; k + kUnroll * kLanes <= n; k += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) {
      const Floats weights = LoadFloats<kind>(from, k + u * kLanes);
      for (int m = 0; m < M; ++m) acc[m][u] += weights * Load<Floats>(x + m * n + k + u * kLanes);
    }
  for (; k < n; k += kLanes) {  // the rest; zeros stand beyond the end
    const int64_t left = std::min<int64_t>(kLanes, n - k);
    char weights[kLanes * kWidth] = {};
    std::memcpy(weights, from + k * kWidth, left * kWidth);
    for (int m = 0; m < M; ++m) {
      float inputs[kLanes] = {};
      std::memcpy(inputs, x + m * n + k, left * sizeof(float));
      acc[m][0] += LoadFloats<kind>(weights, 0) * Load<Floats>(inputs);
    }
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
void FloatRows(const Weights& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    InSteps<2>(m, [&](auto count, int64_t i) {
      FloatRow<kind, decltype(count)::value>(w, x + i * w.inputs, row, y + i * w.rows);
    });
}

void AnyFloatRows(const Weights& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
  if (w.kind == Kind::kF32) return FloatRows<Kind::kF32>(w, x, m, y, begin, end);
  if (w.kind == Kind::kBf16) return FloatRows<Kind::kBf16>(w, x, m, y, begin, end);
  if (w.kind == Kind::kF16) return FloatRows<Kind::kF16>(w, x, m, y, begin, end);
}

// ---------------------------------------------------------------- activations as integers

constexpr int64_t kSub = 32;  // columns of x that share a scale, whatever the weights' group

struct Quantized {
  int16_t q[kSub];
  float scale;
  float sum;  // of the values, for affine weights
};

// 32 values as integers up to `steps`; `count` of them are real, the others zero. NaN and infinity make the scale NaN.
inline Quantized Quantize(const float* from, int64_t count, float steps) {
  float values[kSub] = {};
  if (count > 0) std::memcpy(values, from, std::min(count, kSub) * sizeof(float));
  Quantized out;
  Ints top{};
  Floats sum{};
  for (int64_t i = 0; i < kSub; i += kLanes) {
    // Magnitudes compare like their bits, which puts NaN on top.
    const Ints magnitude = Load<Ints>(values + i) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    sum += Load<Floats>(values + i);
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, top[i]);
  const float largest = Bits<float>(bits);
  const bool finite = bits < 0x7f800000, nonzero = largest > 1e-30f;
  out.scale = !finite ? std::numeric_limits<float>::quiet_NaN() : nonzero ? largest / steps : 0.0f;
  out.sum = Sum(sum);
  const float inverse = finite && nonzero ? steps / largest : 0.0f;
  for (int64_t i = 0; i < kSub; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; NaN leaves some, and its scale is NaN.
    constexpr float kMagic = 12582912.0f;
    out.q[i] = static_cast<int16_t>(Bits<int32_t>(values[i] * inverse + kMagic));
  }
  return out;
}

}  // namespace
}  // namespace jaxchat
