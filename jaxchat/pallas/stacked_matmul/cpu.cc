// XLA foreign function: y = x @ w[layer].T, reading one layer straight out of the stack.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "cpu_kernels.h"
#include "../cpu_isa.h"
#include "../cpu_parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxchat {
namespace {

namespace ffi = xla::ffi;

const Kernels* Pick() {
  switch (InstructionSet()) {
#if defined(__x86_64__)
    case Isa::kAvx512: return &Avx512Kernels();
    case Isa::kAvx2: return &Avx2Kernels();
#endif
    case Isa::kPortable: return &PortableKernels();
    default: return nullptr;
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory Allocate(int64_t bytes) { return Memory(std::aligned_alloc(64, (bytes + 127) / 64 * 64)); }

const void* AtLayer(const ffi::AnyBuffer& stack, int64_t layer) {
  int64_t bytes = ffi::ByteWidth(stack.element_type());
  for (size_t i = 1; i < stack.dimensions().size(); ++i) bytes *= stack.dimensions()[i];
  return static_cast<const char*>(stack.untyped_data()) + layer * bytes;
}

ffi::Error StackedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                         ffi::AnyBuffer mins, ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::Buffer<ffi::F32>> y,
                         int64_t kind, int64_t cols, int64_t group, bool affine, bool few) {
  static const Kernels* const kernels = Pick();
  if (kernels == nullptr) return ffi::Error::Internal("no kernel for this processor");
  const int64_t stack = codes.dimensions()[0];
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= stack) return ffi::Error::InvalidArgument("layer out of range");
  Weights w{};
  w.kind = static_cast<Kind>(kind);
  w.codes = AtLayer(codes, at);
  w.scales = AtLayer(scales, at);
  w.mins = affine ? AtLayer(mins, at) : nullptr;
  w.wide_scales = scales.element_type() == ffi::F32;
  w.rows = codes.dimensions()[1];
  w.cols = cols;
  w.group = group;
  w.inputs = x.dimensions()[1];
  const int64_t m = x.dimensions()[0];
  const float* in = x.typed_data();
  float* out = y->typed_data();
  if (few) {
    Memory prepared = Allocate(kernels->few_bytes(w, m));
    kernels->few_prepare(w, in, m, prepared.get());
    const int64_t chunk = std::clamp<int64_t>(w.rows / 16, 8, 512);
    ParallelFor(pool, (w.rows + chunk - 1) / chunk, [&](int64_t c) {
      kernels->few(w, in, prepared.get(), m, out, c * chunk, std::min(w.rows, (c + 1) * chunk));
    });
    return ffi::Error::Success();
  }
  Memory prepared = Allocate(kernels->tiled_bytes(w, m));
  ParallelFor(pool, (m + 15) / 16, [&](int64_t c) {
    kernels->tiled_prepare(w, in, m, c * 16, std::min(m, c * 16 + 16), prepared.get());
  });
  constexpr int64_t kChunk = 64;
  ParallelFor(pool, (w.rows + kChunk - 1) / kChunk, [&](int64_t c) {
    Memory scratch = Allocate(kernels->tiled_scratch_bytes(w));
    kernels->tiled(w, prepared.get(), m, out, c * kChunk, std::min(w.rows, (c + 1) * kChunk), scratch.get());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxchat

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxchatStackedMatmul, jaxchat::StackedMatmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("cols")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("affine")
                                  .Attr<bool>("few"));
