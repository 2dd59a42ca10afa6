// What cpu_avx512.cc needs of AVX-512, VNNI and BF16, a lane at a time, after Intel's Intrinsics Guide: included before
// it, the kernels run on processors with AVX2. Aligned loads and stores insist on it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace lanes {

template <typename T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  T at[kCount];
};

template <typename T, typename Vector>
Lanes<T> Of(Vector v) {
  static_assert(sizeof v == 64);
  Lanes<T> out;
  std::memcpy(&out, &v, 64);
  return out;
}

template <typename Vector, typename T>
Vector To(Lanes<T> lanes) {
  Vector out;
  std::memcpy(&out, &lanes, 64);
  return out;
}

// A vector of make(lane).
template <typename T, typename Make>
auto Each(const Make& make) {
  Lanes<T> out;
  for (int i = 0; i < out.kCount; ++i) out.at[i] = make(i);
  return To<std::conditional_t<std::is_same_v<T, float>, __m512, __m512i>>(out);
}

// a[i] op b[i]
template <typename T, typename Vector, typename Op>
Vector Pairs(Vector a, Vector b, const Op& op) {
  const auto x = Of<T>(a), y = Of<T>(b);
  return Each<T>([&](int i) { return static_cast<T>(op(x.at[i], y.at[i])); });
}

inline void CheckAligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();
}

template <typename Vector>
Vector Load(const void* from) {
  CheckAligned(from);
  Vector out;
  std::memcpy(&out, from, 64);
  return out;
}

inline __m512i LoadAnywhere(const void* from) {
  __m512i out;
  std::memcpy(&out, from, 64);
  return out;
}

inline void Store(void* to, __m512i v) {
  CheckAligned(to);
  std::memcpy(to, &v, 64);
}

// Lanes the mask leaves out are zero, and their memory is not read.
inline __m512i LoadBytes(uint64_t mask, const void* from) {
  return Each<int8_t>([&](int i) { return mask >> i & 1 ? static_cast<const int8_t*>(from)[i] : int8_t{}; });
}

inline __m512 LoadFloats(uint16_t mask, const void* from) {
  return Each<float>([&](int i) { return mask >> i & 1 ? static_cast<const float*>(from)[i] : 0.0f; });
}

inline __m256i LoadShorts(uint16_t mask, const void* from) {
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? static_cast<const uint16_t*>(from)[i] : 0;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
}

inline void StoreFloats(void* to, uint16_t mask, __m512 v) {
  const auto x = Of<float>(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<float*>(to)[i] = x.at[i];
}

inline void StoreShorts(void* to, uint16_t mask, __m256i v) {
  uint16_t x[16];
  std::memcpy(x, &v, sizeof x);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = x[i];
}

// Lane `first` of each 128 bits of a, of b, then the next lane of a, of b.
template <typename T>
__m512i Unpack(__m512i a, __m512i b, int first) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto x = Of<T>(a), y = Of<T>(b);
  return Each<T>([&](int i) {
    const int from = i / kWidth * kWidth + first + i % kWidth / 2;
    return i % 2 ? y.at[from] : x.at[from];
  });
}

inline __m512i DotProduct(__m512i sum, __m512i bytes, __m512i signed_bytes) {
  const auto s = Of<int32_t>(sum);
  const auto a = Of<uint8_t>(bytes);
  const auto b = Of<int8_t>(signed_bytes);
  return Each<int32_t>([&](int i) {
    int32_t out = s.at[i];
    for (int k = 4 * i; k < 4 * i + 4; ++k) out += a.at[k] * b.at[k];
    return out;
  });
}

inline float WidenBfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline __m512 DotProduct(__m512 sum, __m512bh a, __m512bh b) {
  const auto s = Of<float>(sum);
  const auto x = Of<uint16_t>(a), y = Of<uint16_t>(b);
  return Each<float>([&](int i) {
    float out = s.at[i];
    for (int k : {2 * i + 1, 2 * i}) out += WidenBfloat16(x.at[k]) * WidenBfloat16(y.at[k]);
    return out;
  });
}

// To the nearest, ties to even.
inline __m256bh Bfloat16(__m512 v) {
  const auto x = Of<uint32_t>(v);
  const auto f = Of<float>(v);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i)
    out[i] = std::isnan(f.at[i]) ? x.at[i] >> 16 | 0x40 : (x.at[i] + 0x7fff + (x.at[i] >> 16 & 1)) >> 16;
  __m256bh halves;
  std::memcpy(&halves, out, sizeof halves);
  return halves;
}

inline __m512 WidenHalves(__m256i halves) {
  float out[16];
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
  _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  return Each<float>([&](int i) { return out[i]; });
}

inline __m512i WidenBytes(__m128i bytes) {
  int8_t x[16];
  std::memcpy(x, &bytes, sizeof x);
  return Each<int32_t>([&](int i) { return x[i]; });
}

// The low part of each lane, packed.
template <typename To, typename From, typename Narrow>
Narrow Truncate(__m512i v) {
  const auto x = Of<From>(v);
  To out[Lanes<From>::kCount];
  for (int i = 0; i < x.kCount; ++i) out[i] = static_cast<To>(x.at[i]);
  Narrow narrow;
  static_assert(sizeof narrow == sizeof out);
  std::memcpy(&narrow, out, sizeof narrow);
  return narrow;
}

inline __m512i Gather(__m512i index, const void* base, int scale) {
  const auto x = Of<int32_t>(index);
  return Each<int32_t>([&](int i) {
    int32_t out;
    std::memcpy(&out, static_cast<const char*>(base) + static_cast<int64_t>(x.at[i]) * scale, sizeof out);
    return out;
  });
}

template <typename T, typename Vector>
Vector Permute(Vector a, __m512i index, Vector b) {
  const auto x = Of<T>(a), y = Of<T>(b);
  const auto from = Of<int32_t>(index);
  return Each<T>([&](int i) { return (from.at[i] & 16 ? y : x).at[from.at[i] & 15]; });
}

// Above the first four lanes: undefined.
inline __m512 Widen(__m128 four) {
  float x[4];
  _mm_storeu_ps(x, four);
  return Each<float>([&](int i) { return i < 4 ? x[i] : std::numeric_limits<float>::quiet_NaN(); });
}

// Bit by bit what the table says of three bits.
inline __m512i ByTable(__m512i a, __m512i b, __m512i c, int table) {
  const auto x = Of<uint32_t>(a), y = Of<uint32_t>(b), z = Of<uint32_t>(c);
  return Each<uint32_t>([&](int i) {
    uint32_t out = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int number = (x.at[i] >> bit & 1) << 2 | (y.at[i] >> bit & 1) << 1 | (z.at[i] >> bit & 1);
      out |= static_cast<uint32_t>(table >> number & 1) << bit;
    }
    return out;
  });
}

inline __m512 MultiplyAdd(__m512 a, __m512 b, __m512 c) {
  const auto x = Of<float>(a), y = Of<float>(b), z = Of<float>(c);
  return Each<float>([&](int i) { return std::fma(x.at[i], y.at[i], z.at[i]); });
}

inline float Sum(__m512 v) {
  auto x = Of<float>(v);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x.at[i] += x.at[i + step];
  return x.at[0];
}

}  // namespace lanes

#define JAXCHAT_EMULATED  // functions are compiled for no other processor than the compiler is told

#define LANES_SPLAT(T, x) lanes::Each<T>([&](int) { return static_cast<T>(x); })
#define LANES_SHIFT(T, a, op, n) \
  lanes::Pairs<T>(a, a, [&](auto x, auto) { return x op(n); })

#define _mm512_add_epi32(a, b) lanes::Pairs<uint32_t>(a, b, [](auto x, auto y) { return x + y; })
#define _mm512_and_si512(a, b) lanes::Pairs<uint64_t>(a, b, [](auto x, auto y) { return x & y; })
#define _mm512_castps128_ps512 lanes::Widen
#define _mm512_cvtepi32_epi8(a) (lanes::Truncate<int8_t, int32_t, __m128i>(a))
#define _mm512_cvtepi32_ps(a) lanes::Each<float>([x = lanes::Of<int32_t>(a)](int i) { return float(x.at[i]); })
#define _mm512_cvtepi8_epi32 lanes::WidenBytes
#define _mm512_cvtneps_pbh lanes::Bfloat16
#define _mm512_cvtph_ps lanes::WidenHalves
#define _mm512_dpbf16_ps lanes::DotProduct
#define _mm512_dpbusd_epi32 lanes::DotProduct
#define _mm512_fmadd_ps lanes::MultiplyAdd
#define _mm512_i32gather_epi32 lanes::Gather
#define _mm512_load_ps lanes::Load<__m512>
#define _mm512_load_si512 lanes::Load<__m512i>
#define _mm512_loadu_si512 lanes::LoadAnywhere
#define _mm512_mask_storeu_ps lanes::StoreFloats
#define _mm256_mask_storeu_epi16 lanes::StoreShorts
#define _mm512_maskz_loadu_epi8 lanes::LoadBytes
#define _mm256_maskz_loadu_epi16 lanes::LoadShorts
#define _mm512_maskz_loadu_ps lanes::LoadFloats
#define _mm512_mul_ps(a, b) lanes::Pairs<float>(a, b, [](auto x, auto y) { return x * y; })
#define _mm512_or_si512(a, b) lanes::Pairs<uint64_t>(a, b, [](auto x, auto y) { return x | y; })
#define _mm512_permutex2var_epi32 lanes::Permute<int32_t>
#define _mm512_permutex2var_ps lanes::Permute<float>
#define _mm512_permutexvar_epi32(index, a) lanes::Permute<int32_t>(a, index, a)
#define _mm512_permutexvar_ps(index, a) lanes::Permute<float>(a, index, a)
#define _mm512_reduce_add_ps lanes::Sum
#define _mm512_set1_epi32(x) LANES_SPLAT(int32_t, x)
#define _mm512_set1_epi8(x) LANES_SPLAT(int8_t, x)
#define _mm512_setzero_ps() LANES_SPLAT(float, 0)
#define _mm512_setzero_si512() LANES_SPLAT(int32_t, 0)
#define _mm512_slli_epi32(a, n) LANES_SHIFT(uint32_t, a, <<, n)
#define _mm512_srli_epi16(a, n) LANES_SHIFT(uint16_t, a, >>, n)
#define _mm512_srli_epi32(a, n) LANES_SHIFT(uint32_t, a, >>, n)
#define _mm512_store_si512 lanes::Store
#define _mm512_ternarylogic_epi32 lanes::ByTable
#define _mm512_unpackhi_epi32(a, b) lanes::Unpack<int32_t>(a, b, 2)
#define _mm512_unpackhi_epi64(a, b) lanes::Unpack<int64_t>(a, b, 1)
#define _mm512_unpacklo_epi32(a, b) lanes::Unpack<int32_t>(a, b, 0)
#define _mm512_unpacklo_epi64(a, b) lanes::Unpack<int64_t>(a, b, 0)
#define _mm512_xor_si512(a, b) lanes::Pairs<uint64_t>(a, b, [](auto x, auto y) { return x ^ y; })
