#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace jaxchat {
namespace {

bool Supports(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return isa == Isa::kPortable;
}

const char* Name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kNone: break;
  }
  return "";
}

Isa Choose() {
  const char* wanted = std::getenv("JAXCHAT_CPU_ISA");
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPortable})
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

// For jaxchat/native.py.
extern "C" int JaxchatMultipliesBfloat16() { return jaxchat::MultipliesBfloat16(); }

// The name, empty where there is none.
extern "C" const char* JaxchatInstructionSet() {
  return jaxchat::Name(jaxchat::InstructionSet());
}
