#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace jaxchat {
namespace {

#if defined(__aarch64__) && defined(__APPLE__)
bool Has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

bool Supports(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  if (isa == Isa::kDotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#if defined(HWCAP2_I8MM) && !defined(JAXCHAT_NO_I8MM)  // older headers and compilers do not know it
  if (isa == Isa::kI8mm) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP && getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
  if (isa == Isa::kDotprod) return Has("hw.optional.arm.FEAT_DotProd");
#if !defined(JAXCHAT_NO_I8MM)
  if (isa == Isa::kI8mm) return Has("hw.optional.arm.FEAT_DotProd") && Has("hw.optional.arm.FEAT_I8MM");
#endif
#endif
  return isa == Isa::kPortable;
}

const char* Name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kDotprod: return "dotprod";
    case Isa::kI8mm: return "i8mm";
    case Isa::kNone: break;
  }
  return "";
}

Isa Choose() {
  const char* wanted = std::getenv("JAXCHAT_CPU_ISA");
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kI8mm, Isa::kDotprod, Isa::kPortable})
    if (Supports(isa) && (wanted == nullptr || std::strcmp(wanted, Name(isa)) == 0)) return isa;
  return Isa::kNone;
}

}  // namespace

Isa InstructionSet() {
  static const Isa chosen = Choose();
  return chosen;
}

bool MultipliesBfloat16() {
#if defined(__x86_64__)
  return InstructionSet() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace jaxchat

// For jaxchat/pallas/native.py.
extern "C" int JaxchatMultipliesBfloat16() { return jaxchat::MultipliesBfloat16(); }

// The name, empty where there is none.
extern "C" const char* JaxchatInstructionSet() {
  return jaxchat::Name(jaxchat::InstructionSet());
}
