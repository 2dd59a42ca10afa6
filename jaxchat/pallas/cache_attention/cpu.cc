// XLA foreign function: attention of new tokens over one slot of the slot-stacked KV cache.
#include <string_view>
#include <vector>

#include "../cpu_isa.h"
#include "../cpu_parallel.h"
#include "cpu_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jaxchat {
namespace {

namespace ffi = xla::ffi;

const AttentionTable* TableOf(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512: return &avx512::kAttention;
    case Isa::kAvx2: return &avx2::kAttention;
#endif
    case Isa::kPortable:
    case Isa::kDotprod:
    case Isa::kI8mm: return &portable::kAttention;
    default: return nullptr;
  }
}

ffi::Error CacheAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::S32> slot,
                          ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> window,
                          ffi::Buffer<ffi::S32> ancestors, ffi::Buffer<ffi::S32> depths,
                          ffi::Result<ffi::Buffer<ffi::F32>> out, float softcap, std::string_view isa) {
  const AttentionTable* const table = TableOf(InstructionSet(isa));
  if (table == nullptr) return ffi::Error::InvalidArgument("isa names no instruction set that runs here");
  const auto q_dims = q.dimensions(), k_dims = k.dimensions();
  Attention a{};
  a.batch = q_dims[0];
  a.tokens = q_dims[1];
  a.heads = q_dims[2];
  a.head_dim = q_dims[3];
  a.kv_heads = k_dims[2];
  a.capacity = k_dims[3];
  const int64_t at = slot.typed_data()[0];
  if (at < 0 || at >= k_dims[0]) return ffi::Error::InvalidArgument("slot out of range");
  const size_t width = ffi::ByteWidth(k.element_type());  // cpu.py passes nothing else than these three
  const Stored form = width == 4 ? Stored::kFloat32 : width == 2 ? Stored::kBfloat16 : Stored::kInt8;
  const AttentionKernels& kernels = (*table)[form];
  const int64_t rows = at * a.batch * a.kv_heads * a.capacity, bytes = rows * a.head_dim * width;
  a.q = q.typed_data();
  a.k = static_cast<const char*>(k.untyped_data()) + bytes;
  a.v = static_cast<const char*>(v.untyped_data()) + bytes;
  if (form == Stored::kInt8) {
    a.k_scale = k_scale.typed_data() + rows;
    a.v_scale = v_scale.typed_data() + rows;
  }
  a.out = out->typed_data();
  a.lengths = lengths.typed_data();
  a.scale = scale.typed_data()[0];
  a.window = window.typed_data()[0];
  a.softcap = softcap;
  if (ancestors.element_count() > 0) {
    if (a.tokens > kTree) return ffi::Error::InvalidArgument("a tree has at most 32 tokens");
    a.ancestors = ancestors.typed_data();
    a.depths = depths.typed_data();
  }
  std::vector<float> partial(kernels.partial_floats(a));
  ParallelFor(pool, kernels.tasks(a), [&](int64_t task) { kernels.run(a, task, partial.data()); });
  kernels.merge(a, partial.data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxchat

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxchatCacheAttention, jaxchat::CacheAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("softcap")
                                  .Attr<std::string_view>("isa"));
