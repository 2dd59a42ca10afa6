// The instruction sets that kernels are compiled for, and which of them run here.
#pragma once
#include <string_view>

namespace jaxchat {

enum class Isa { kPortable, kAvx2, kAvx512, kDotprod, kI8mm, kNone };
constexpr int kIsas = static_cast<int>(Isa::kNone);

// The instruction set of a name (`portable`, `avx2`, `avx512`, `dotprod`, `i8mm`); kNone: unknown, or not here. Empty:
// the default, decided once: the one that the environment variable JAXCHAT_CPU_ISA names, or else the best.
Isa InstructionSet(std::string_view name);

// Whether the processor multiplies bfloat16, beside kAvx512.
bool MultipliesBfloat16();

}  // namespace jaxchat
