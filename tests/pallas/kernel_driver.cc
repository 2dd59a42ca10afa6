// Multiplies what it reads from standard input by one instruction set's kernels (KERNELS names their table), writes
// the products to standard output, and so on to the end: so that kernels run under an emulator without Python.
//
// A record: nine int64 (kind, rows, cols, group, inputs, m, few, wide scales, has minimums), then the codes, scales,
// minimums, and x float32 [m, inputs].
#include <cstdio>
#include <cstdlib>

#include "cpu_kernels.h"

namespace {

char* Read(int64_t bytes) {
  auto* memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
  if (std::fread(memory, 1, bytes, stdin) != static_cast<size_t>(bytes)) std::exit(1);
  return memory;
}

}  // namespace

int main() {
  using namespace jaxchat;
  const Kernels& kernels = KERNELS();
  for (int64_t head[9]; std::fread(head, sizeof head, 1, stdin) == 1;) {
    Weights w{};
    w.kind = static_cast<Kind>(head[0]);
    w.rows = head[1];
    w.cols = head[2];
    w.group = head[3];
    w.inputs = head[4];
    const int64_t m = head[5], scales = w.rows * (w.cols / w.group) * (head[7] ? 4 : 2);
    const bool quantized = w.kind == Kind::kInt8 || w.kind == Kind::kInt4;
    w.wide_scales = head[7];
    w.codes = Read(w.rows * w.cols * (w.kind == Kind::kF32 ? 8 : quantized ? (w.kind == Kind::kInt8 ? 2 : 1) : 4) / 2);
    w.scales = quantized ? Read(scales) : nullptr;
    w.mins = head[8] ? Read(scales) : nullptr;
    const auto* x = reinterpret_cast<const float*>(Read(m * w.inputs * 4));
    auto* y = static_cast<float*>(std::calloc(m * w.rows, sizeof(float)));
    if (head[6]) {
      void* prepared = std::aligned_alloc(64, (kernels.few_bytes(w, m) + 127) / 64 * 64);
      kernels.few_prepare(w, x, m, prepared);
      kernels.few(w, x, prepared, m, y, 0, w.rows);
    } else {
      void* prepared = std::aligned_alloc(64, (kernels.tiled_bytes(w, m) + 127) / 64 * 64);
      void* scratch = std::aligned_alloc(64, (kernels.tiled_scratch_bytes(w) + 127) / 64 * 64);
      for (int64_t i = 0; i < m; i += 16) kernels.tiled_prepare(w, x, m, i, m < i + 16 ? m : i + 16, prepared);
      for (int64_t row = 0; row < w.rows; row += 64)
        kernels.tiled(w, prepared, m, y, row, w.rows < row + 64 ? w.rows : row + 64, scratch);
    }
    std::fwrite(y, sizeof(float), m * w.rows, stdout);
  }
}
