// ARM processors with dot products of bytes.
#define JAXCHAT_ISA JAXCHAT_DOTPROD
#include "cpu_neon-inl.h"
