// Attends to what it reads from standard input by one instruction set's kernels (TABLE names them), writes the
// results to standard output, and so on to the end: so that kernels run under an emulator without Python.
//
// A record: nine int64 (batch, tokens, heads, kv heads, capacity, head size, stored, window, whether the tokens are a
// tree), float32 scale and softcap, then q, k, v, the scales of an int8 cache, the lengths, ancestors and depths.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu_kernels.h"

namespace {

char* Read(int64_t bytes) {
  auto* memory = static_cast<char*>(std::malloc(bytes));
  if (std::fread(memory, 1, bytes, stdin) != static_cast<size_t>(bytes)) std::exit(1);
  return memory;
}

template <typename T>
const T* ReadSome(int64_t count) {
  return reinterpret_cast<const T*>(Read(count * sizeof(T)));
}

}  // namespace

int main() {
  using namespace jaxchat;
  for (int64_t head[9]; std::fread(head, sizeof head, 1, stdin) == 1;) {
    Attention a{};
    a.batch = head[0];
    a.tokens = head[1];
    a.heads = head[2];
    a.kv_heads = head[3];
    a.capacity = head[4];
    a.head_dim = head[5];
    const auto form = static_cast<Stored>(head[6]);
    const AttentionKernels& kernels = TABLE[form];
    a.window = head[7];
    a.scale = *ReadSome<float>(1);
    a.softcap = *ReadSome<float>(1);
    const int64_t outputs = a.batch * a.tokens * a.heads * a.head_dim;
    const int64_t rows = a.batch * a.kv_heads * a.capacity;
    const int64_t width = form == Stored::kFloat32 ? 4 : form == Stored::kBfloat16 ? 2 : 1;
    a.q = ReadSome<float>(outputs);
    a.k = Read(rows * a.head_dim * width);
    a.v = Read(rows * a.head_dim * width);
    if (form == Stored::kInt8) {
      a.k_scale = ReadSome<float>(rows);
      a.v_scale = ReadSome<float>(rows);
    }
    a.lengths = ReadSome<int32_t>(a.batch);
    if (head[8]) {
      a.ancestors = ReadSome<int32_t>(a.batch * a.tokens);
      a.depths = ReadSome<int32_t>(a.batch * a.tokens);
    }
    std::vector<float> out(outputs), partial(kernels.partial_floats(a));
    a.out = out.data();
    for (int64_t task = 0; task < kernels.tasks(a); ++task) kernels.run(a, task, partial.data());
    kernels.merge(a, partial.data());
    std::fwrite(out.data(), sizeof(float), outputs, stdout);
  }
}
