// One call of low-rank deltas, and the kernels over it: a table for each instruction set. cpu.cc picks at run time.
#pragma once
#include <cstdint>

namespace jaxchat {

// out = y + low @ b, where low = (x @ a.T) * scales, of one weight and layer. Columns that no row uses are not read.
struct Delta {
  const float* y;   // [M, O]
  const void* a;    // [R, I]
  const void* b;    // [R, O]
  float* low;       // [M, R]
  float* out;       // [M, O]
  int64_t outputs;  // O
};

struct Deltas {
  const float* x;          // [M, I]
  const float* scales;     // [M, R]
  const int32_t* columns;  // those of R that any row uses
  int64_t used, m, inputs, rank;
};

struct DeltaKernels {
  void (*down)(const Deltas&, const Delta&, int64_t begin, int64_t end);  // of the used columns
  void (*up)(const Deltas&, const Delta&, int64_t begin, int64_t end);    // of the outputs
};

struct DeltaTable {
  DeltaKernels floats, halves;  // of a and b: float32 or float16
};

namespace portable {
extern const DeltaTable kDeltas;
}
#if defined(__x86_64__)
namespace avx2 {
extern const DeltaTable kDeltas;
}
namespace avx512 {
extern const DeltaTable kDeltas;
}
#endif

}  // namespace jaxchat
