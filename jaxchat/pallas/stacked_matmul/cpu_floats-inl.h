// A few rows of x times float weights.
#pragma once
#include "../cpu_steps-inl.h"
#include "../cpu_target.h"
#include "../cpu_vectors-inl.h"
#include "cpu_kernels.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

// Asks for weights that are read soon. Rows follow each other: what is next lies ahead also where a row ends.
template <int64_t kBytesRead>
inline void Prefetch(const void* weights) {
  constexpr int64_t kAhead = kBytes == 64 ? 4096 : 1024;
  for (int64_t i = 0; i < kBytesRead; i += 64) __builtin_prefetch(static_cast<const char*>(weights) + kAhead + i);
}

// What one step takes: columns of the weights as vectors of floats, which meet as many vectors of x.
template <Kind kind>
struct FloatVectors {
  static constexpr int kCount = 1;
  Floats values[1];
  explicit FloatVectors(const void* from) {
    if constexpr (kind == Kind::kFloat32)
      values[0] = Load<Floats>(from);
    else
      values[0] = WidenHalf(Load<Halves>(from));
  }
};

// A bfloat16 is the upper half of a float32. Of a vector of 32 bits, the lower halves are the even columns, and the
// upper ones, the others cleared, the odd ones: `SplitEvenOdd` gives x that order.
template <>
struct FloatVectors<Kind::kBfloat16> {
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
  constexpr int kWidth = kind == Kind::kFloat32 ? 4 : 2;
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
      std::memcpy(inputs + m * kStep, x + m * stride + k, (kind == Kind::kBfloat16 ? kStep : left) * sizeof(float));
    add(weights, inputs, kStep, 0);
  }
  for (int m = 0; m < M; ++m) y[m * w.rows + row] = Sum((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
}

// What a table has for a few rows of x and float weights, which meet x as it is.
template <Kind kind>
struct FloatRows {
  static int64_t Bytes(const Weights&, int64_t) { return 0; }

  static void Prepare(const Weights&, const float*, int64_t, void*) {}

  static void Run(const Weights& w, const float* x, const void*, int64_t m, float* y, int64_t begin, int64_t end) {
    Multiply(w, x, w.inputs, m, y, begin, end);
  }

  // Rows of x are `stride` floats apart.
  static void Multiply(const Weights& w, const float* x, int64_t stride, int64_t m, float* y, int64_t begin,
                       int64_t end) {
    constexpr int kMost = kBytes == 64 ? 4 : 2;  // AVX-512 has twice as many registers
    for (int64_t row = begin; row < end; ++row)
      InSteps<kMost>(m, [&](auto count, int64_t i) {
        FloatRow<kind, decltype(count)::value>(w, x + i * stride, stride, row, y + i * w.rows);
      });
  }
};

// bfloat16 weights meet x split into even and odd columns.
struct SplitRows {
  static int64_t Bytes(const Weights& w, int64_t m) {
    return m * SplitColumns(w.inputs) * static_cast<int64_t>(sizeof(float));
  }

  static void Prepare(const Weights& w, const float* x, int64_t m, void* out) {
    SplitEvenOdd(x, m, w.inputs, static_cast<float*>(out));
  }

  static void Run(const Weights& w, const float*, const void* prepared, int64_t m, float* y, int64_t begin,
                  int64_t end) {
    const auto* split = static_cast<const float*>(prepared);
    FloatRows<Kind::kBfloat16>::Multiply(w, split, SplitColumns(w.inputs), m, y, begin, end);
  }
};

}  // namespace
}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
