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
using Integers = ffi::Span<const int64_t>;

const KernelTable* TableOf(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512: return &avx512::kProducts;
    case Isa::kAvx2: return &avx2::kProducts;
#elif defined(__aarch64__)
    case Isa::kDotprod: return &dotprod::kProducts;
#if !defined(JAXCHAT_NO_I8MM)
    case Isa::kI8mm: return &i8mm::kProducts;
#endif
#endif
    case Isa::kPortable: return &portable::kProducts;
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

// A product of the call: its weight, and x as that weight meets it.
struct Product {
  Weights w;
  const Kernels* kernels;
  float* out;
  const void* prepared;
};

// Whether they meet x in the same form.
bool Alike(const Product& a, const Product& b) { return a.kernels == b.kernels && a.w.cols == b.w.cols; }

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

// What a call multiplies: x, and for each weight its product.
struct Call {
  const float* x;
  int64_t m;
  std::vector<Product> products;
  std::vector<Memory> memory;  // of the prepared x

  int64_t Rows() const {
    int64_t rows = 0;
    for (const Product& product : products) rows += product.w.rows;
    return rows;
  }

  // Gives each product x as it meets it; make(product, to) makes that, in bytes(product) bytes.
  template <typename Bytes, typename Make>
  void Prepare(const Bytes& bytes, const Make& make) {
    for (auto product = products.begin(); product != products.end(); ++product) {
      const auto alike = std::find_if(products.begin(), product, [&](const Product& p) { return Alike(p, *product); });
      if (alike == product) {
        memory.push_back(Allocate(bytes(*product)));
        make(*product, memory.back().get());
        product->prepared = memory.back().get();
      } else {
        product->prepared = alike->prepared;
      }
    }
  }
};

ffi::Error Few(ffi::ThreadPool& pool, Call& call) {
  const int64_t m = call.m;
  call.Prepare([&](const Product& p) { return p.kernels->few.bytes(p.w, m); },
               [&](const Product& p, void* to) { p.kernels->few.prepare(p.w, call.x, m, to); });
  const auto work = [&](const Product& p, int64_t begin, int64_t end) {
    p.kernels->few.run(p.w, call.x, p.prepared, m, p.out, begin, end);
  };
  ForAllRows(pool, call.products, std::clamp<int64_t>(call.Rows() / 16, 8, 512), work);
  return ffi::Error::Success();
}

ffi::Error Many(ffi::ThreadPool& pool, Call& call) {
  const int64_t m = call.m;
  for (const Product& p : call.products)
    if (p.kernels->many.run == nullptr) return ffi::Error::InvalidArgument("no kernel of this kind for many rows");
  call.Prepare([&](const Product& p) { return p.kernels->many.bytes(p.w, m); },
               [&](const Product& p, void* to) {
                 ParallelFor(pool, (m + 15) / 16, [&](int64_t c) {
                   p.kernels->many.prepare(p.w, call.x, m, c * 16, std::min(m, c * 16 + 16), to);
                 });
               });
  ForAllRows(pool, call.products, 64, [&](const Product& p, int64_t begin, int64_t end) {
    Memory scratch = Allocate(p.kernels->many.scratch_bytes(p.w));
    p.kernels->many.run(p.w, p.prepared, m, p.out, begin, end, scratch.get());
  });
  return ffi::Error::Success();
}

// A stack is six arguments: codes, high bits, scales, minimums, outer scales and minimums (empty where there are none).
// Weight i is one of parts[i] stacks; layers[i] says which, and the row of it.
ffi::Error StackedMatmuls(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> layers,
                          ffi::RemainingArgs stacks, ffi::RemainingRets outs, Integers parts, Integers kinds,
                          Integers cols, Integers groups, bool few, std::string_view isa) {
  const KernelTable* const table = TableOf(InstructionSet(isa));
  if (table == nullptr) return ffi::Error::InvalidArgument("isa names no instruction set that runs here");
  Call call{x.typed_data(), x.dimensions()[0], {}, {}};
  size_t stack = 0;  // the first of weight i
  for (size_t i = 0; i < parts.size(); stack += parts[i++]) {
    constexpr size_t kArrays = 6;
    auto out = outs.get<ffi::Buffer<ffi::F32>>(i);
    const int64_t which = layers.typed_data()[2 * i], at = layers.typed_data()[2 * i + 1];
    if (which < 0 || which >= parts[i]) return ffi::Error::InvalidArgument("part out of range");
    const size_t s = stack + which;
    if (s >= kinds.size() || stacks.size() < kArrays * (s + 1) || !out.has_value())
      return ffi::Error::InvalidArgument("six arguments a stack and one result a weight");
    if (kinds[s] < 0 || kinds[s] >= kKinds) return ffi::Error::InvalidArgument("no such kind of weights");
    const auto array = [&](size_t number) { return *stacks.get<ffi::AnyBuffer>(kArrays * s + number); };
    if (at < 0 || at >= array(0).dimensions()[0]) return ffi::Error::InvalidArgument("layer out of range");
    Weights w{};
    const void** const arrays[kArrays] = {&w.codes, &w.high, &w.scales, &w.mins, &w.super_scales, &w.super_mins};
    for (size_t number = 0; number < kArrays; ++number) *arrays[number] = AtLayer(array(number), at);
    const ffi::DataType scales = array(2).element_type();
    w.scale_type = scales == ffi::F32 ? ScaleType::kFloat : scales == ffi::S8 ? ScaleType::kInt8 : ScaleType::kHalf;
    w.rows = array(0).dimensions()[1];
    w.cols = cols[s];
    w.group = groups[s];
    w.inputs = x.dimensions()[1];
    call.products.push_back({w, &(*table)[static_cast<Kind>(kinds[s])], (*out)->typed_data(), nullptr});
  }
  return few ? Few(pool, call) : Many(pool, call);
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
                                  .Attr<jaxchat::Integers>("parts")
                                  .Attr<jaxchat::Integers>("kinds")
                                  .Attr<jaxchat::Integers>("cols")
                                  .Attr<jaxchat::Integers>("groups")
                                  .Attr<bool>("few")
                                  .Attr<std::string_view>("isa"));
