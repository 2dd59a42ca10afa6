// Work sharing on XLA's own thread pool.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxchat {

// Calls work(chunk) for every chunk in [0, chunks), on this thread and on idle threads of the pool. The caller
// takes chunks too and never waits for a helper that has not begun one, so a full pool cannot block it. Results
// must not depend on which thread does a chunk.
template <typename Work>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  // A helper may start after everything is done; the shared state outlives this call for it, `work` does not.
  auto state = std::make_shared<State>();
  auto drain = [state, chunks, &work] {
    for (int64_t c; (c = state->next.fetch_add(1)) < chunks;) {
      work(c);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t threads = pool.num_threads();
  for (int64_t i = 1; i < threads && i < chunks; ++i) pool.Schedule(decltype(drain)(drain));
  drain();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < chunks; ++spins)
    if (spins > 4096) std::this_thread::yield();
}

}  // namespace jaxchat
