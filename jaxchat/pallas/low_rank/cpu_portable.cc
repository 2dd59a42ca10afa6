// Any processor: vectors of 16 bytes.
#define JAXCHAT_ISA JAXCHAT_PORTABLE
#include "cpu_deltas-inl.h"
