// Products with two thin matrices. The source of each instruction set includes it.
#pragma once
#include "../cpu_target.h"
#include "../cpu_vectors-inl.h"
#include "cpu_kernels.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

constexpr int kTogether = 4;  // vectors of sums

inline Floats LoadFloats(const float* from) { return Load<Floats>(from); }
inline Floats LoadFloats(const uint16_t* from) { return WidenHalf(Load<Halves>(from)); }

// Fewer than kLanes of them, and zeros.
template <typename Stored>
inline Floats LoadFirst(const Stored* from, int64_t count) {
  Stored padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(Stored));
  return LoadFloats(padded);
}

template <typename Stored>
inline float Dot(const float* x, const Stored* w, int64_t n) {
  Floats sums[kTogether] = {};
  int64_t i = 0;
  for (; i + kTogether * kLanes <= n; i += kTogether * kLanes)
    for (int v = 0; v < kTogether; ++v) sums[v] += Load<Floats>(x + i + v * kLanes) * LoadFloats(w + i + v * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += Load<Floats>(x + i) * LoadFloats(w + i);
  if (i < n) sums[1] += LoadFirst(x + i, n - i) * LoadFirst(w + i, n - i);
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Stored>
void Down(const Deltas& all, const Delta& one, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = all.columns[i];
    const Stored* const a = static_cast<const Stored*>(one.a) + column * all.inputs;
    for (int64_t row = 0; row < all.m; ++row) {
      const int64_t at = row * all.rank + column;
      one.low[at] = Dot(all.x + row * all.inputs, a, all.inputs) * all.scales[at];
    }
  }
}

// kVectors vectors of the outputs of one row, from output o on; `count` of the last are real.
template <int kVectors, typename Stored>
inline void UpBlock(const Deltas& all, const Delta& one, int64_t row, int64_t o, int64_t count) {
  const float* const y = one.y + row * one.outputs + o;
  Floats sums[kVectors];
  const bool whole = count == kVectors * kLanes;
  for (int v = 0; v < kVectors; ++v) sums[v] = whole ? Load<Floats>(y + v * kLanes) : LoadFirst(y, count);
  for (int64_t i = 0; i < all.used; ++i) {
    const int64_t column = all.columns[i];
    const Floats low = Splat(one.low[row * all.rank + column]);
    const Stored* const b = static_cast<const Stored*>(one.b) + column * one.outputs + o;
    for (int v = 0; v < kVectors; ++v) sums[v] += low * (whole ? LoadFloats(b + v * kLanes) : LoadFirst(b, count));
  }
  float* const out = one.out + row * one.outputs + o;
  for (int v = 0; v < kVectors; ++v) {
    if (whole)
      Store(out + v * kLanes, sums[v]);
    else
      std::memcpy(out, &sums[v], count * sizeof(float));
  }
}

template <typename Stored>
void Up(const Deltas& all, const Delta& one, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kTogether * kLanes;
  int64_t o = begin;
  for (; o + kBlock <= end; o += kBlock)
    for (int64_t row = 0; row < all.m; ++row) UpBlock<kTogether, Stored>(all, one, row, o, kBlock);
  for (; o < end; o += kLanes)
    for (int64_t row = 0; row < all.m; ++row)
      UpBlock<1, Stored>(all, one, row, o, std::min<int64_t>(kLanes, end - o));
}

}  // namespace

extern const DeltaTable kDeltas = {{Down<float>, Up<float>}, {Down<uint16_t>, Up<uint16_t>}};

}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
