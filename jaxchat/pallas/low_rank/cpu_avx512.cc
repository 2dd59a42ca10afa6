// Nothing here needs an intrinsic: vectors are AVX-512's, of 64 bytes.
#define JAXCHAT_ISA JAXCHAT_AVX512
#include "cpu_deltas-inl.h"
