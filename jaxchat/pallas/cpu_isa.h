// Which of the compiled instruction sets this process uses.
#pragma once

namespace jaxchat {

enum class Isa { kNone, kPortable, kAvx2, kAvx512, kDotprod, kI8mm };

// Decided once: the best that the processor has, or the one that the environment variable JAXCHAT_CPU_ISA names
// (`portable`, `avx2`, `avx512`, `dotprod`, `i8mm`: tests run every variant on one machine). kNone: that one is unknown
// or not here.
Isa InstructionSet();

// Whether the processor multiplies bfloat16, beside kAvx512.
bool MultipliesBfloat16();

}  // namespace jaxchat
