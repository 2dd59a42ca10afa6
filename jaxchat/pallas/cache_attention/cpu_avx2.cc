// The portable source's vectors are two of AVX2's.
#include "cpu_portable.cc"
