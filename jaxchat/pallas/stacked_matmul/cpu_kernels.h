// Weights as they lie in the layer stack, and the row kernels over them. Each instruction set exports one
// table; cpu.cc picks one at run time.
#pragma once
#include <cstdint>

namespace jaxchat {

enum class Kind : int64_t { kF32 = 0, kBf16 = 1, kF16 = 2, kInt8 = 3, kInt4 = 4 };

// One layer's weight [rows, cols]: w = code * scale (+ min), scale and min per `group` columns.
struct Weights {
  Kind kind;
  const void* codes;
  const void* scales;  // [rows, cols / group], float16 or float32; null for float kinds
  const void* mins;    // like scales, or null
  bool wide_scales;    // scales and mins are float32
  int64_t rows;
  int64_t cols;   // a multiple of `group`, which is a multiple of 32, for quantized kinds
  int64_t group;
  // Columns of x; those from here to `cols` are padding and meet zeros.
  int64_t inputs;
};

// x [m, inputs] in the form a kernel reads. Filled by `prepare`, in `bytes(m)` bytes of 64-byte aligned memory.
// Few rows: 8-bit weights meet at least 15 bits per activation, 4-bit weights at least 8. Tiled, many rows: at least
// 8 bits for both (as in llama.cpp).
struct Kernels {
  const char* name;
  int64_t (*few_bytes)(const Weights&, int64_t m);
  void (*few_prepare)(const Weights&, const float* x, int64_t m, void* out);
  void (*few)(const Weights&, const float* x, const void* prepared, int64_t m, float* y, int64_t begin,
                  int64_t end);
  int64_t (*tiled_bytes)(const Weights&, int64_t m);
  void (*tiled_prepare)(const Weights&, const float* x, int64_t m, int64_t begin, int64_t end, void* out);
  // Rows [begin, end) of the weights, begin a multiple of 32; `scratch` holds tiled_scratch_bytes.
  void (*tiled)(const Weights&, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end,
                void* scratch);
  int64_t (*tiled_scratch_bytes)(const Weights&);
};

const Kernels& PortableKernels();
#if defined(__x86_64__)
const Kernels& Avx2Kernels();
const Kernels& Avx512Kernels();
#elif defined(__aarch64__)
const Kernels& DotprodKernels();
const Kernels& I8mmKernels();
#endif

}  // namespace jaxchat
