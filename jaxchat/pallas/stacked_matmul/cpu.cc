// XLA foreign function: y = x @ w[layer].T for several weights, read straight out of their stacks.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "cpu_kernels.h"
#include "../cpu_isa.h"
#include "../cpu_parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxchat {
namespace {

namespace ffi = xla::ffi;

const Kernels* Pick(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512: return &Avx512Kernels();
    case Isa::kAvx2: return &Avx2Kernels();
#elif defined(__aarch64__)
    case Isa::kDotprod: return &DotprodKernels();
#if !defined(JAXCHAT_NO_I8MM)
    case Isa::kI8mm: return &I8mmKernels();
#endif
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

// A product of the call: its weight, and x as that weight reads it.
struct Product {
  Weights w;
  float* out;
  const void* prepared;
};

bool ReadAlike(const Weights& a, const Weights& b) {
  return a.kind == b.kind && a.cols == b.cols && (a.mins == nullptr) == (b.mins == nullptr);
}

// Calls work(product, begin, end) for all rows of all weights, `chunk` at a time.
template <typename Work>
void ForAllRows(ffi::ThreadPool& pool, const std::vector<Product>& products, int64_t chunk, const Work& work) {
  std::vector<int64_t> ends;  // of the products, in chunks
  for (const Product& product : products)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (product.w.rows + chunk - 1) / chunk);
  ParallelFor(pool, ends.back(), [&](int64_t c) {
    const size_t i = std::upper_bound(ends.begin(), ends.end(), c) - ends.begin();
    const int64_t begin = (i ? c - ends[i - 1] : c) * chunk;
    work(products[i], begin, std::min(products[i].w.rows, begin + chunk));
  });
}

using Integers = ffi::Span<const int64_t>;

// Weight i is arguments 3 i to 3 i + 2: codes, scales and minimums (empty where there are none).
ffi::Error StackedMatmuls(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> layers,
                          ffi::RemainingArgs weights, ffi::RemainingRets outs, Integers kinds, Integers cols,
                          Integers groups, bool few, std::string_view isa) {
  const Kernels* const kernels = Pick(InstructionSet(isa));
  if (kernels == nullptr) return ffi::Error::InvalidArgument("isa names no instruction set that runs here");
  const int64_t m = x.dimensions()[0];
  const float* in = x.typed_data();
  std::vector<Product> products;
  std::vector<Memory> memory;
  int64_t rows = 0;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const auto codes = weights.get<ffi::AnyBuffer>(3 * i), scales = weights.get<ffi::AnyBuffer>(3 * i + 1),
               mins = weights.get<ffi::AnyBuffer>(3 * i + 2);
    auto out = outs.get<ffi::Buffer<ffi::F32>>(i);
    if (!codes.has_value() || !scales.has_value() || !mins.has_value() || !out.has_value())
      return ffi::Error::InvalidArgument("three arguments and one result a weight");
    const int64_t at = layers.typed_data()[i];
    if (at < 0 || at >= codes->dimensions()[0]) return ffi::Error::InvalidArgument("layer out of range");
    Weights w{};
    w.kind = static_cast<Kind>(kinds[i]);
    w.codes = AtLayer(*codes, at);
    w.scales = AtLayer(*scales, at);
    w.mins = mins->element_count() ? AtLayer(*mins, at) : nullptr;
    w.wide_scales = scales->element_type() == ffi::F32;
    w.rows = codes->dimensions()[1];
    w.cols = cols[i];
    w.group = groups[i];
    w.inputs = x.dimensions()[1];
    rows += w.rows;
    const auto alike = std::find_if(products.begin(), products.end(),
                                    [&](const Product& other) { return ReadAlike(other.w, w); });
    if (alike != products.end()) {
      products.push_back({w, (*out)->typed_data(), alike->prepared});
      continue;
    }
    memory.push_back(Allocate(few ? kernels->few_bytes(w, m) : kernels->tiled_bytes(w, m)));
    void* prepared = memory.back().get();
    if (few)
      kernels->few_prepare(w, in, m, prepared);
    else
      ParallelFor(pool, (m + 15) / 16, [&](int64_t c) {
        kernels->tiled_prepare(w, in, m, c * 16, std::min(m, c * 16 + 16), prepared);
      });
    products.push_back({w, (*out)->typed_data(), prepared});
  }
  if (few) {
    ForAllRows(pool, products, std::clamp<int64_t>(rows / 16, 8, 512), [&](const Product& p, int64_t begin, int64_t end) {
      kernels->few(p.w, in, p.prepared, m, p.out, begin, end);
    });
  } else {
    ForAllRows(pool, products, 64, [&](const Product& p, int64_t begin, int64_t end) {
      Memory scratch = Allocate(kernels->tiled_scratch_bytes(p.w));
      kernels->tiled(p.w, p.prepared, m, p.out, begin, end, scratch.get());
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxchat

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxchatStackedMatmuls, jaxchat::StackedMatmuls,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<jaxchat::Integers>("kinds")
                                  .Attr<jaxchat::Integers>("cols")
                                  .Attr<jaxchat::Integers>("groups")
                                  .Attr<bool>("few")
                                  .Attr<std::string_view>("isa"));
