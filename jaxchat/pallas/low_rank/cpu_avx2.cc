// Nothing here needs an intrinsic: vectors are AVX2's, of 32 bytes.
#define JAXCHAT_ISA JAXCHAT_AVX2
#include "cpu_deltas-inl.h"
