// The order in which weight rows meet rows of x, so that both stay in the caches.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace jaxchat {
namespace {

// Calls visit(count, i, row, from, to) for every row of the weights, every few (`count`, up to kMost) rows of x from i
// on, and blocks [from, to) of the columns, in order. So many rows and blocks of x, `block_bytes` each, stay in the
// first-level cache while a few rows of the weights, in the second, pass by.
template <int kMost, typename Visit>
void ForRowsInBlocks(int64_t m, int64_t begin, int64_t end, int64_t blocks, int64_t block_bytes, const Visit& visit) {
  if constexpr (kMost > 0) {
    const int64_t whole = m / kMost * kMost;
    const int64_t step = kMost == 1 ? blocks : std::max<int64_t>(1, 32768 / block_bytes / kMost);
    for (int64_t first = begin; first < end && whole > 0; first += 32)
      for (int64_t i = 0; i < whole; i += kMost)
        for (int64_t b = 0; b < blocks; b += step)
          for (int64_t row = first; row < std::min(first + 32, end); ++row)
            visit(std::integral_constant<int, kMost>(), i, row, b, std::min(b + step, blocks));
    const auto rest = [&](auto count, int64_t i, int64_t row, int64_t from, int64_t to) {
      visit(count, whole + i, row, from, to);
    };
    if (m > whole) ForRowsInBlocks<kMost - 1>(m - whole, begin, end, blocks, block_bytes, rest);
  }
}

}  // namespace
}  // namespace jaxchat
