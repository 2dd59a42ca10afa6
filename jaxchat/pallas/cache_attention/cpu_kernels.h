// One call of cache attention, and the kernels over it: a table for each instruction set, a row of it for each form of
// the cache. cpu.cc picks at run time.
#pragma once
#include <cstdint>

namespace jaxchat {

enum class Stored : int64_t { kFloat32, kBfloat16, kInt8 };  // int8: codes, times one scale a row
constexpr int64_t kStored = 3;
constexpr int64_t kTree = 32;  // tokens of a tree, at most

struct Attention {
  const float* q;  // [B, T, N, H]
  const void* k;   // [B, K, S, H] of one slot
  const void* v;
  const float* k_scale;  // [B, K, S] of the same slot, with int8
  const float* v_scale;
  float* out;      // [B, T, N, H]
  int64_t batch, tokens, heads, kv_heads, capacity, head_dim;
  const int32_t* lengths;  // [B], rows before the first new token
  float scale, softcap;    // softcap 0: none
  int64_t window;          // 0: all
  // Of new tokens that are a tree, else null: [B, T]. Of the new keys a token sees those whose bits it has.
  const int32_t* ancestors;
  const int32_t* depths;  // its position, from the first new token on
};

// A task is one key/value head of one sequence, a tile of its new tokens and a split of the keys. Tiles and
// splits depend on the shapes only, never on the threads, so neither do the results.
struct AttentionKernels {
  int64_t (*tasks)(const Attention&);
  int64_t (*partial_floats)(const Attention&);  // room that the splits of a decode step need, may be 0
  void (*run)(const Attention&, int64_t task, float* partial);
  void (*merge)(const Attention&, const float* partial);  // after all tasks
};

struct AttentionTable {
  AttentionKernels stored[kStored];
  constexpr const AttentionKernels& operator[](Stored form) const { return stored[static_cast<int64_t>(form)]; }
};

namespace portable {
extern const AttentionTable kAttention;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AttentionTable kAttention;
}
namespace avx512 {
extern const AttentionTable kAttention;
}
#endif

}  // namespace jaxchat
