// Some number of rows, up to k at a time: each step's number is a constant to the compiler.
#pragma once
#include "cpu_target.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

template <int kCount, int kLeast, typename Work>
inline void LastStep(int64_t left, int64_t i, const Work& work) {
  if constexpr (kCount >= kLeast) {
    if (left == kCount) return work(std::integral_constant<int, kCount>(), i);
    LastStep<kCount - 1, kLeast>(left, i, work);
  }
}

// Calls work(count, i) for rows [i, i + count) until all m are done: kMost at a time, and what is left, at least
// kLeast, at once.
template <int kMost, int kLeast = 1, typename Work>
inline void InSteps(int64_t m, const Work& work) {
  int64_t i = 0;
  for (; i + kMost <= m; i += kMost) work(std::integral_constant<int, kMost>(), i);
  LastStep<kMost - 1, kLeast>(m - i, i, work);
}

}  // namespace
}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
