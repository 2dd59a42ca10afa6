// Multiplies what it reads from standard input by one instruction set's kernels (TABLE names them), writes
// the products to standard output, and so on to the end: so that kernels run under an emulator without Python.
//
// A record: 14 int64 (kind, rows, cols, group, inputs, m, few, type of scales, bytes of each part of the weights), then
// those parts, as in `Weights`, and x float32 [m, inputs].
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
  for (int64_t head[14]; std::fread(head, sizeof head, 1, stdin) == 1;) {
    const Kernels& kernels = TABLE[static_cast<Kind>(head[0])];
    Weights w{};
    w.rows = head[1];
    w.cols = head[2];
    w.group = head[3];
    w.inputs = head[4];
    w.scale_type = static_cast<ScaleType>(head[7]);
    const int64_t m = head[5];
    const void** const parts[] = {&w.codes, &w.high, &w.scales, &w.mins, &w.super_scales, &w.super_mins};
    for (int i = 0; i < 6; ++i) *parts[i] = Read(head[8 + i]);
    const auto* x = reinterpret_cast<const float*>(Read(m * w.inputs * 4));
    auto* y = static_cast<float*>(std::calloc(m * w.rows, sizeof(float)));
    if (head[6]) {
      void* prepared = std::aligned_alloc(64, (kernels.few.bytes(w, m) + 127) / 64 * 64);
      kernels.few.prepare(w, x, m, prepared);
      kernels.few.run(w, x, prepared, m, y, 0, w.rows);
    } else {
      void* prepared = std::aligned_alloc(64, (kernels.many.bytes(w, m) + 127) / 64 * 64);
      void* scratch = std::aligned_alloc(64, (kernels.many.scratch_bytes(w) + 127) / 64 * 64);
      for (int64_t i = 0; i < m; i += 16) kernels.many.prepare(w, x, m, i, m < i + 16 ? m : i + 16, prepared);
      for (int64_t row = 0; row < w.rows; row += 64)
        kernels.many.run(w, prepared, m, y, row, w.rows < row + 64 ? w.rows : row + 64, scratch);
    }
    std::fwrite(y, sizeof(float), m * w.rows, stdout);
  }
}
