// Weights as they lie in the layer stack, and the kernels over them: a table for each instruction set, a row of it for
// each kind of weights. cpu.cc picks at run time.
#pragma once
#include <cstdint>

namespace jaxchat {

// As in cpu.py. Affine: code * scale + min; other quantized weights: code * scale.
enum class Kind : int64_t {
  kFloat32, kBfloat16, kFloat16, kInt8, kInt8Affine, kInt4, kInt4Affine, kInt5, kInt5Affine, kInt6
};
constexpr int64_t kKinds = 10;

enum class ScaleType { kHalf, kFloat, kInt8 };

// One layer's weight [rows, cols], with scales (and minimums) per `group` columns.
struct Weights {
  const void* codes;         // below 8 bits: the low 4
  const void* high;          // at 5 and 6 bits: what is above, in the order of packing.py
  const void* scales;        // [rows, cols / group]: `scale_type`; for quantized kinds
  const void* mins;          // like scales, for affine kinds
  const void* super_scales;  // [rows, cols / 256], float16: what integer scales are times
  const void* super_mins;
  ScaleType scale_type;
  int64_t rows;
  int64_t cols;   // a multiple of `group`, and of 256 where scales are integers, for quantized kinds
  int64_t group;  // a multiple of 32; at 6 bits 16
  // Columns of x; those from here to `cols` are padding and meet zeros.
  int64_t inputs;
};

// A few rows of x [m, inputs]: 8-bit weights meet at least 15 bits per activation, others at least 8.
struct FewKernel {
  // x in the form the weights meet it: `prepare` fills `bytes` bytes of 64-byte aligned memory.
  int64_t (*bytes)(const Weights&, int64_t m);
  void (*prepare)(const Weights&, const float* x, int64_t m, void* out);
  void (*run)(const Weights&, const float* x, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end);
};

// Many rows of x: at least 8 bits for both sides (as in llama.cpp).
struct ManyKernel {
  int64_t (*bytes)(const Weights&, int64_t m);
  // Rows [begin, end) of x, begin a multiple of 16.
  void (*prepare)(const Weights&, const float* x, int64_t m, int64_t begin, int64_t end, void* out);
  // Rows [begin, end) of the weights, begin a multiple of 32; `scratch` holds `scratch_bytes`, aligned as above.
  void (*run)(const Weights&, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch);
  int64_t (*scratch_bytes)(const Weights&);
};

struct Kernels {
  FewKernel few;
  ManyKernel many;  // null where nothing is faster than XLA
};

struct KernelTable {
  Kernels kinds[kKinds];
  constexpr Kernels& operator[](Kind kind) { return kinds[static_cast<int64_t>(kind)]; }
  constexpr const Kernels& operator[](Kind kind) const { return kinds[static_cast<int64_t>(kind)]; }
};

namespace portable {
extern const KernelTable kProducts;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kProducts;
}
namespace avx512 {
extern const KernelTable kProducts;
}
#elif defined(__aarch64__)
namespace dotprod {
extern const KernelTable kProducts;
}
namespace i8mm {
extern const KernelTable kProducts;
}
#endif

}  // namespace jaxchat
