// Vectors as wide as the instruction set's, by the compiler's vector extension: arithmetic needs no intrinsics.
//
// Each source compiles it for its processors: everything is in an unnamed namespace.
#pragma once
#include "cpu_target.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

#if JAXCHAT_ISA == JAXCHAT_AVX512
constexpr int kBytes = 64;
#elif JAXCHAT_ISA == JAXCHAT_AVX2
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef uint16_t UShorts __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));  // kLanes bfloat16 or float16
typedef int8_t Quarters __attribute__((vector_size(kBytes / 4)));  // kLanes bytes

template <typename Vector>
inline Vector Load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
inline void Store(void* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename To, typename From>
inline To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats Splat(float x) { return Floats{} + x; }

inline Floats ToFloats(Ints v) { return __builtin_convertvector(v, Floats); }

// float16 bits -> float32. In integers except for subnormals, whose offset trick also works where the thread
// flushes float32 subnormals to zero.
inline Floats WidenHalf(Halves half) {
#if JAXCHAT_ISA == JAXCHAT_AVX512
  return Bits<Floats>(_mm512_cvtph_ps(Bits<__m256i>(half)));
#elif JAXCHAT_ISA == JAXCHAT_AVX2
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

inline Floats WidenBfloat16(Halves half) { return Bits<Floats>(__builtin_convertvector(half, Ints) << 16); }

// kLanes of them. GCC has no single instruction for the general form.
inline Ints WidenBytes(const int8_t* from) {
#if JAXCHAT_ISA == JAXCHAT_AVX512
  return Bits<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif JAXCHAT_ISA == JAXCHAT_AVX2
  return Bits<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(Load<Quarters>(from), Ints);
#endif
}

template <typename Vector>
inline auto Sum(Vector v) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// ---------------------------------------------------------------- kLanes vectors, transposed in place

#if JAXCHAT_ISA == JAXCHAT_AVX512
// Lanes D apart change places between two rows that are D apart: by halves, quarters and so on.
template <int D>
inline void Exchange(Floats* first, Floats* second) {
  struct Index {
    alignas(64) int32_t low[16], high[16];  // lane l of the first and second row of a pair, out of both
  };
  static constexpr Index kIndex = [] {
    Index index{};
    for (int l = 0; l < 16; ++l) {
      index.low[l] = l & D ? 16 + l - D : l;
      index.high[l] = l & D ? 16 + l : l + D;
    }
    return index;
  }();
  const __m512i low = _mm512_load_si512(kIndex.low), high = _mm512_load_si512(kIndex.high);
  const auto a = reinterpret_cast<__m512>(*first), b = reinterpret_cast<__m512>(*second);
  *first = reinterpret_cast<Floats>(_mm512_permutex2var_ps(a, low, b));
  *second = reinterpret_cast<Floats>(_mm512_permutex2var_ps(a, high, b));
}

template <int D>
inline void Exchange(Floats* rows) {
  for (int i = 0; i < 16; ++i)
    if (!(i & D)) Exchange<D>(rows + i, rows + i + D);
}

inline void Transpose(Floats* rows) {
  Exchange<8>(rows);
  Exchange<4>(rows);
  Exchange<2>(rows);
  Exchange<1>(rows);
}
#elif JAXCHAT_ISA == JAXCHAT_AVX2
inline void Transpose(Floats* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = reinterpret_cast<__m256>(rows[i]);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = reinterpret_cast<Floats>(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    rows[i + 4] = reinterpret_cast<Floats>(_mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#else
inline void Transpose(Floats* rows) {
  const Floats a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  for (int i = 0; i < 4; ++i) rows[i] = Floats{a[i], b[i], c[i], d[i]};
}
#endif

// The sums of kLanes vectors: lane i is that of vector i. Fewer shuffles than a transposition takes.
#if JAXCHAT_ISA == JAXCHAT_AVX512
template <int D = 8>
inline Floats SumEach(Floats* v) {
  for (int i = 0; i < D; ++i) {
    Exchange<D>(v + i, v + i + D);
    v[i] += v[i + D];
  }
  if constexpr (D > 1) return SumEach<D / 2>(v);
  return v[0];
}
#elif JAXCHAT_ISA == JAXCHAT_AVX2
inline Floats SumEach(Floats* v) {
  const auto add = [](Floats a, Floats b, auto low, auto high) {
    return Bits<Floats>(_mm256_shuffle_ps(Bits<__m256>(a), Bits<__m256>(b), decltype(low)::value)) +
           Bits<Floats>(_mm256_shuffle_ps(Bits<__m256>(a), Bits<__m256>(b), decltype(high)::value));
  };
  const auto halves = [&](int i) {  // of four vectors, in each half
    constexpr std::integral_constant<int, 0x44> kFront;
    constexpr std::integral_constant<int, 0xee> kBack;
    constexpr std::integral_constant<int, 0x88> kEven;
    constexpr std::integral_constant<int, 0xdd> kOdd;
    return Bits<__m256>(
        add(add(v[i], v[i + 1], kFront, kBack), add(v[i + 2], v[i + 3], kFront, kBack), kEven, kOdd));
  };
  const __m256 a = halves(0), b = halves(4);
  return Bits<Floats>(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
#else
inline Floats SumEach(Floats* v) {
  Transpose(v);
  return (v[0] + v[1]) + (v[2] + v[3]);
}
#endif

}  // namespace
}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
