#include "cpu_isa.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
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

#if defined(__x86_64__)
// Older versions of Clang do not know it by name.
bool HasF16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

bool Supports(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
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

constexpr struct {
  Isa isa;
  const char* name;
} kBestFirst[] = {{Isa::kAvx512, "avx512"},
                  {Isa::kAvx2, "avx2"},
                  {Isa::kI8mm, "i8mm"},
                  {Isa::kDotprod, "dotprod"},
                  {Isa::kPortable, "portable"}};

// Asked once: in a virtual machine the question is a call to its host.
bool RunsHere(Isa isa) {
  static const auto here = [] {
    std::array<bool, kIsas> all{};
    for (int i = 0; i < kIsas; ++i) all[i] = Supports(static_cast<Isa>(i));
    return all;
  }();
  return here[static_cast<int>(isa)];
}

// The best that runs here, of all or of those with this name.
Isa Best(const char* name) {
  for (const auto& set : kBestFirst)
    if (RunsHere(set.isa) && (name == nullptr || std::strcmp(name, set.name) == 0)) return set.isa;
  return Isa::kNone;
}

Isa Default() {
  static const Isa chosen = Best(std::getenv("JAXCHAT_CPU_ISA"));
  return chosen;
}

}  // namespace

Isa InstructionSet(std::string_view name) {
  return name.empty() ? Default() : Best(std::string(name).c_str());
}

bool MultipliesBfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace jaxchat

// For jaxchat/pallas/native.py.
extern "C" {

int JaxchatMultipliesBfloat16() { return jaxchat::MultipliesBfloat16(); }

// The names of what runs here, the best first, and a space after each.
const char* JaxchatInstructionSets() {
  static const std::string names = [] {
    std::string all;
    for (const auto& set : jaxchat::kBestFirst)
      if (jaxchat::RunsHere(set.isa)) all += set.name + std::string(" ");
    return all;
  }();
  return names.c_str();
}

// The default's name, empty where JAXCHAT_CPU_ISA names none that runs here.
const char* JaxchatInstructionSet() {
  for (const auto& set : jaxchat::kBestFirst)
    if (set.isa == jaxchat::InstructionSet("")) return set.name;
  return "";
}
}
