// Nothing here needs an intrinsic: the portable source's vectors are AVX-512's.
#include "cpu_portable.cc"
