// Which processors a source is for. It defines JAXCHAT_ISA, to one of the five below, and includes this first; what it
// compiles for them stands between JAXCHAT_BEGIN and JAXCHAT_END, in headers called -inl.h too, in the namespace
// jaxchat::JAXCHAT_NAMESPACE.
//
// Only functions in between use a processor's instructions. What the standard headers define inline, of which the
// linker keeps one for all sources, any processor can run. The idea is Highway's (HWY_BEFORE_NAMESPACE).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define JAXCHAT_PORTABLE 0
#define JAXCHAT_AVX2 1
#define JAXCHAT_AVX512 2
#define JAXCHAT_DOTPROD 3
#define JAXCHAT_I8MM 4

#if JAXCHAT_ISA == JAXCHAT_PORTABLE
#define JAXCHAT_NAMESPACE portable
#elif JAXCHAT_ISA == JAXCHAT_AVX2
#define JAXCHAT_NAMESPACE avx2
#define JAXCHAT_FEATURES "avx2,fma,f16c"
#elif JAXCHAT_ISA == JAXCHAT_AVX512
#define JAXCHAT_NAMESPACE avx512
#define JAXCHAT_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"
#define JAXCHAT_FEATURES_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c"
#elif JAXCHAT_ISA == JAXCHAT_DOTPROD
#define JAXCHAT_NAMESPACE dotprod
#define JAXCHAT_FEATURES "arch=armv8.2-a+dotprod"
#elif JAXCHAT_ISA == JAXCHAT_I8MM
#define JAXCHAT_NAMESPACE i8mm
#define JAXCHAT_FEATURES "arch=armv8.2-a+dotprod+i8mm"
#endif

#define JAXCHAT_PRAGMA(text) _Pragma(#text)
#if JAXCHAT_ISA == JAXCHAT_PORTABLE || defined(JAXCHAT_EMULATED)  // see tests/pallas/avx512.h
#define JAXCHAT_BEGIN_WITH(features)
#define JAXCHAT_END
#elif defined(__clang__)
#define JAXCHAT_BEGIN_WITH(features) \
  JAXCHAT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define JAXCHAT_END JAXCHAT_PRAGMA(clang attribute pop)
#else
#define JAXCHAT_BEGIN_WITH(features) JAXCHAT_PRAGMA(GCC push_options) JAXCHAT_PRAGMA(GCC target(features))
#define JAXCHAT_END JAXCHAT_PRAGMA(GCC pop_options)
#endif
#define JAXCHAT_BEGIN JAXCHAT_BEGIN_WITH(JAXCHAT_FEATURES)
