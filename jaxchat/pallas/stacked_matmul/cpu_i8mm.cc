// ARM processors with products of matrices of bytes.
#define JAXCHAT_ISA JAXCHAT_I8MM
#include "cpu_neon-inl.h"
