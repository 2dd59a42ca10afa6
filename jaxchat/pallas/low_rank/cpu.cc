// XLA foreign function: what low-rank deltas add to the products of one x with several weights.
#include <algorithm>
#include <string_view>
#include <vector>

#include "../cpu_isa.h"
#include "../cpu_parallel.h"
#include "cpu_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jaxchat {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunkBytes = 1 << 16;  // read by a task: less is not worth a thread

const DeltaTable* TableOf(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512: return &avx512::kDeltas;
    case Isa::kAvx2: return &avx2::kDeltas;
#endif
    case Isa::kPortable:
    case Isa::kDotprod:
    case Isa::kI8mm: return &portable::kDeltas;
    default: return nullptr;
  }
}

// The deltas cut into chunks of rows, which are shared out; count(delta) is how many it has of them.
template <typename Count, typename Work>
void ForAll(ffi::ThreadPool& pool, const std::vector<Delta>& deltas, int64_t chunk, const Count& count,
            const Work& work) {
  std::vector<int64_t> ends;  // of the deltas, in chunks
  for (const Delta& delta : deltas) ends.push_back((ends.empty() ? 0 : ends.back()) + (count(delta) + chunk - 1) / chunk);
  ParallelFor(pool, ends.back(), [&](int64_t c) {
    const size_t i = std::upper_bound(ends.begin(), ends.end(), c) - ends.begin();
    const int64_t begin = (i ? c - ends[i - 1] : c) * chunk;
    work(deltas[i], begin, std::min(count(deltas[i]), begin + chunk));
  });
}

// A delta is three arguments, y [M, O], a [L, R, I] and b [L, R, O], and one result.
ffi::Error LowRank(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scales,
                   ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs operands, ffi::RemainingRets outs,
                   std::string_view isa) {
  const DeltaTable* const table = TableOf(InstructionSet(isa));
  if (table == nullptr) return ffi::Error::InvalidArgument("isa names no instruction set that runs here");
  const int64_t m = x.dimensions()[0], inputs = x.dimensions()[1], rank = scales.dimensions()[1];
  const int64_t at = layer.typed_data()[0];
  std::vector<int32_t> columns;
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t row = 0; row < m; ++row)
      if (scales.typed_data()[row * rank + r] != 0) {
        columns.push_back(static_cast<int32_t>(r));
        break;
      }
  const Deltas all{x.typed_data(), scales.typed_data(), columns.data(), static_cast<int64_t>(columns.size()),
                   m, inputs, rank};
  std::vector<float> low(outs.size() * m * rank);
  std::vector<Delta> deltas;
  int64_t width = 4;
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = outs.get<ffi::Buffer<ffi::F32>>(i);
    auto y = operands.get<ffi::Buffer<ffi::F32>>(3 * i);
    auto a = operands.get<ffi::AnyBuffer>(3 * i + 1), b = operands.get<ffi::AnyBuffer>(3 * i + 2);
    if (!out.has_value() || !y.has_value() || !a.has_value() || !b.has_value())
      return ffi::Error::InvalidArgument("three arguments and one result a delta");
    if (at < 0 || at >= a->dimensions()[0]) return ffi::Error::InvalidArgument("layer out of range");
    width = static_cast<int64_t>(ffi::ByteWidth(a->element_type()));  // of all alike: see cpu.py
    const int64_t outputs = b->dimensions()[2];
    deltas.push_back({y->typed_data(), static_cast<const char*>(a->untyped_data()) + at * rank * inputs * width,
                      static_cast<const char*>(b->untyped_data()) + at * rank * outputs * width,
                      low.data() + i * m * rank, (*out)->typed_data(), outputs});
  }
  const DeltaKernels& kernels = width == 2 ? table->halves : table->floats;
  ForAll(pool, deltas, std::max<int64_t>(1, kChunkBytes / (inputs * width)), [&](const Delta&) { return all.used; },
         [&](const Delta& delta, int64_t begin, int64_t end) { kernels.down(all, delta, begin, end); });
  const int64_t outputs = kChunkBytes / (std::max<int64_t>(1, all.used) * width);
  ForAll(pool, deltas, std::clamp<int64_t>(outputs / 64 * 64, 64, 4096), [](const Delta& delta) { return delta.outputs; },
         [&](const Delta& delta, int64_t begin, int64_t end) { kernels.up(all, delta, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxchat

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxchatLowRank, jaxchat::LowRank,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("isa"));
