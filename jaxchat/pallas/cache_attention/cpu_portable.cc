// Grouped-query attention of new tokens over the KV cache, with an online softmax over blocks of keys.
//
// Written in 16-wide vectors that the compiler maps to what the target has; compiled once per instruction set.
// A tile holds every query head of one key/value head for a few tokens,
// so that a block of keys, turned to [H, keys] once, serves all of them.
#include "cpu_kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace jaxchat {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int8_t B16 __attribute__((vector_size(16)));

constexpr int64_t kKeys = 64;       // keys in a block: four vectors
constexpr int64_t kRows = 64;       // query rows in a tile, about
constexpr int64_t kSplit = 512;     // keys that one task of a decode step takes
constexpr float kMasked = -1e30f;   // finite: a block without a visible key gives 0, not NaN

inline F16 Load(const float* p) {
  F16 r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
inline F16 Load(const uint16_t* p) {
  H16 h;
  std::memcpy(&h, p, sizeof h);
  const U16 bits = __builtin_convertvector(h, U16) << 16;
  F16 r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
inline F16 Load(const int8_t* p) {
  B16 b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, F16);
}
inline float Widen(float x) { return x; }
inline float Widen(int8_t x) { return x; }
inline float Widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
inline void Store(float* p, F16 x) { std::memcpy(p, &x, sizeof x); }
inline F16 Splat(float x) { return F16{} + x; }

inline float Sum(F16 x) {
  float total = 0;
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return total + x[0];
}

// exp to about 1e-7 relative (Cephes' polynomial); 0 below -87; NaN stays NaN.
inline F16 Exp(F16 x) {
  const I16 tiny = x < -87.0f;
  x = x > 88.0f ? Splat(88.0f) : x;
  x = tiny ? Splat(-87.0f) : x;
  const F16 magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const F16 shifted = x * 1.44269504088896341f + magic;
  const F16 n = shifted - magic;
  const F16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F16 y = Splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  I16 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const I16 power = ((bits - 0x4b400000) + 127) << 23;
  F16 scale;
  std::memcpy(&scale, &power, sizeof scale);
  y = y * scale;
  return tiny ? F16{} : y;
}

inline F16 Softcap(F16 x, float cap) {
  const F16 e = Exp(x * (2.0f / cap));
  return cap * (1.0f - 2.0f / (e + 1.0f));
}

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where a task is in the problem.
struct Tile {
  int64_t b, kv, t0, t1, split, splits;
  int64_t group;        // query heads of a key/value head
  int64_t begin, end;   // keys
};

int64_t TokensInTile(const Attention& a) {
  return std::min(a.tokens, std::max<int64_t>(1, kRows / (a.heads / a.kv_heads)));
}

// A decode step is split along the keys too: few heads alone would not occupy the cores.
int64_t Splits(const Attention& a) {
  if (a.tokens > 1) return 1;
  return (*std::max_element(a.lengths, a.lengths + a.batch) + kSplit) / kSplit;
}

Tile Locate(const Attention& a, int64_t task) {
  Tile tile;
  tile.group = a.heads / a.kv_heads;
  tile.splits = Splits(a);
  const int64_t step = TokensInTile(a), tiles = (a.tokens + step - 1) / step;
  tile.split = task % tile.splits;
  task /= tile.splits;
  tile.t0 = task % tiles * step;
  tile.t1 = std::min(a.tokens, tile.t0 + step);
  tile.kv = task / tiles % a.kv_heads;
  tile.b = task / tiles / a.kv_heads;
  const int64_t length = a.lengths[tile.b];
  tile.begin = a.window ? std::max<int64_t>(0, length + tile.t0 - a.window + 1) : 0;
  tile.end = std::min(a.capacity, length + tile.t1);
  if (tile.splits > 1) {
    tile.begin = std::max(tile.begin, tile.split * kSplit);
    tile.end = std::min(tile.end, (tile.split + 1) * kSplit);
  }
  return tile;
}

// Keys a query at `position` sees: [first, last).
inline void Visible(const Attention& a, int64_t position, int64_t* first, int64_t* last) {
  *first = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
  *last = position + 1;
}

#if defined(__AVX512F__)
// 16 by 16 in place, by halves, quarters and so on. (Elsewhere the compiler would make scalar code of it.)
template <int D>
inline void Exchange(__m512* rows) {
  struct Index {
    alignas(64) int32_t low[16], high[16];  // lane l of the first and second row of a pair, out of both
  };
  static constexpr Index kIndex = [] {
    Index index{};
    for (int l = 0; l < 16; ++l) {
      index.low[l] = l & D ? 16 + l - D : l;
      index.high[l] = l & D ? 16 + l : l + D;
    }
    return index;
  }();
  const __m512i low = _mm512_load_si512(kIndex.low), high = _mm512_load_si512(kIndex.high);
  for (int i = 0; i < 16; ++i) {
    if (i & D) continue;
    const __m512 a = rows[i], b = rows[i + D];
    rows[i] = _mm512_permutex2var_ps(a, low, b);
    rows[i + D] = _mm512_permutex2var_ps(a, high, b);
  }
}

inline void Transpose16(__m512* rows) {
  Exchange<8>(rows);
  Exchange<4>(rows);
  Exchange<2>(rows);
  Exchange<1>(rows);
}
#endif

// [keys, H] -> [H, 64]; missing keys are zero.
template <typename T>
void Transpose(const T* k, int64_t h, int64_t keys, float* out) {
  for (int64_t j = 0; j < kKeys; j += 16) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; keys - j >= 16 && i + 16 <= h; i += 16) {
      __m512 rows[16];
      for (int r = 0; r < 16; ++r) rows[r] = reinterpret_cast<__m512>(Load(k + (j + r) * h + i));
      Transpose16(rows);
      for (int c = 0; c < 16; ++c) _mm512_storeu_ps(out + (i + c) * kKeys + j, rows[c]);
    }
#endif
    for (; i < h; i += 8) {
      const int64_t width = std::min<int64_t>(8, h - i), count = std::min<int64_t>(16, keys - j);
      for (int64_t c = 0; c < width; ++c) {
        float column[16];
        for (int64_t r = 0; r < 16; ++r) column[r] = r < count ? Widen(k[(j + r) * h + i + c]) : 0.0f;
        std::memcpy(out + (i + c) * kKeys + j, column, sizeof column);
      }
    }
  }
}

// [keys, H] -> float32 [keys, padded], zeros behind.
template <typename T>
void WidenRows(const T* v, int64_t h, int64_t keys, int64_t padded, float* out) {
  for (int64_t i = 0; i < keys; ++i, v += h, out += padded) {
    int64_t c = 0;
    for (; c + 16 <= h; c += 16) Store(out + c, Load(v + c));
    for (; c < padded; ++c) out[c] = c < h ? Widen(v[c]) : 0.0f;
  }
}

// scores[rows, 64] = q[rows, H] @ kt[H, 64]
template <int R>
void Scores(const float* q, int64_t stride, const float* kt, int64_t h, float* scores) {
  F16 acc[R][4] = {};
  for (int64_t i = 0; i < h; ++i) {
    const F16 k0 = Load(kt + i * kKeys), k1 = Load(kt + i * kKeys + 16), k2 = Load(kt + i * kKeys + 32),
              k3 = Load(kt + i * kKeys + 48);
    for (int r = 0; r < R; ++r) {
      const float x = q[r * stride + i];
      acc[r][0] += x * k0;
      acc[r][1] += x * k1;
      acc[r][2] += x * k2;
      acc[r][3] += x * k3;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) Store(scores + r * kKeys + 16 * c, acc[r][c]);
}

// out[rows, W * 16 columns] = decay * out + p[rows, keys] @ v[keys, ...]
template <int R, int W>
void Mix(const float* p, const float* decay, const float* v, int64_t v_stride, int64_t keys, float* out,
         int64_t stride) {
  F16 acc[R][W];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < W; ++c) acc[r][c] = Load(out + r * stride + 16 * c) * decay[r];
  for (int64_t j = 0; j < keys; ++j) {
    F16 row[W];
    for (int c = 0; c < W; ++c) row[c] = Load(v + j * v_stride + 16 * c);
    for (int r = 0; r < R; ++r) {
      const float x = p[r * kKeys + j];
      for (int c = 0; c < W; ++c) acc[r][c] += x * row[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < W; ++c) Store(out + r * stride + 16 * c, acc[r][c]);
}

template <int R>
void MixAll(const float* p, const float* decay, const float* v, int64_t v_stride, int64_t keys, float* out,
            int64_t padded) {
  int64_t c = 0;
  for (; c + 64 <= padded; c += 64) Mix<R, 4>(p, decay, v + c, v_stride, keys, out + c, padded);
  for (; c + 16 <= padded; c += 16) Mix<R, 1>(p, decay, v + c, v_stride, keys, out + c, padded);
}

struct Row {
  float top, total;
};

// Turns a row of scores into weights, updates its running maximum and sum, returns what to scale its output by.
// The scales of int8 keys multiply the scores, those of int8 values the weights; else they are null.
float Softmax(const Attention& a, float* scores, int64_t first, int64_t last, const float* k_scale,
              const float* v_scale, Row* row) {
  // Keys [first, last) of the block are visible.
  F16 x[4];
  F16 top = Splat(kMasked);
  for (int c = 0; c < 4; ++c) {
    x[c] = Load(scores + 16 * c) * a.scale;
    if (k_scale != nullptr) x[c] *= Load(k_scale + 16 * c);
    if (a.softcap != 0) x[c] = Softcap(x[c], a.softcap);
    if (first > 16 * c || last < 16 * c + 16)
      for (int64_t i = 0; i < 16; ++i)
        if (16 * c + i < first || 16 * c + i >= last) x[c][i] = kMasked;
    top = x[c] > top ? x[c] : top;
  }
  float best = row->top;
  for (int i = 0; i < 16; ++i) best = std::max(best, top[i]);
  F16 sum = {};
  for (int c = 0; c < 4; ++c) {
    const F16 p = x[c] == kMasked ? F16{} : Exp(x[c] - best);
    Store(scores + 16 * c, v_scale == nullptr ? p : p * Load(v_scale + 16 * c));
    sum += p;
  }
  const float decay = std::exp(row->top - best);
  row->total = row->total * decay + Sum(sum);
  row->top = best;
  return decay;
}

template <typename T>
void Run(const Attention& a, int64_t task, float* partial) {
  const Tile tile = Locate(a, task);
  const int64_t h = a.head_dim, padded = RoundUp(h, 16), rows = (tile.t1 - tile.t0) * tile.group;
  const int64_t n0 = tile.kv * tile.group;
  const auto* k = static_cast<const T*>(a.k) + (tile.b * a.kv_heads + tile.kv) * a.capacity * h;
  const auto* v = static_cast<const T*>(a.v) + (tile.b * a.kv_heads + tile.kv) * a.capacity * h;
  static thread_local std::vector<float> memory;
  const int64_t need = rows * h + rows * padded + h * kKeys + kKeys * padded + 6 * kKeys + rows * kKeys + 64;
  if (static_cast<int64_t>(memory.size()) < need) memory.resize(need);
  float* q = memory.data();               // [rows, H]
  float* out = q + rows * h;              // [rows, padded]
  float* kt = out + rows * padded;        // [H, 64]
  float* values = kt + h * kKeys;         // [64, padded]
  float* scales = values + kKeys * padded;  // [2, 64], of the keys and of the values
  float* scores = scales + 2 * kKeys;     // [rows, 64]
  constexpr bool scaled = sizeof(T) == 1;
  static thread_local std::vector<Row> states;
  states.assign(rows, Row{kMasked, 0});
  for (int64_t t = tile.t0; t < tile.t1; ++t)
    std::memcpy(q + (t - tile.t0) * tile.group * h, a.q + ((tile.b * a.tokens + t) * a.heads + n0) * h,
                tile.group * h * sizeof(float));
  std::fill(out, out + rows * padded, 0.0f);
  // A float32 cache whose rows fill whole vectors is read in place.
  const bool direct = sizeof(T) == sizeof(float) && padded == h;
  for (int64_t j = tile.begin; j < tile.end; j += kKeys) {
    const int64_t keys = std::min(kKeys, tile.end - j);
    Transpose(k + j * h, h, keys, kt);
    const float* block = reinterpret_cast<const float*>(v + j * h);
    if (!direct) {
      WidenRows(v + j * h, h, keys, padded, values);
      block = values;
    }
    if (scaled) {
      // What lies beyond the keys in use is nobody's.
      const int64_t at = (tile.b * a.kv_heads + tile.kv) * a.capacity + j;
      std::fill(scales, scales + 2 * kKeys, 0.0f);
      std::memcpy(scales, a.k_scale + at, keys * sizeof(float));
      std::memcpy(scales + kKeys, a.v_scale + at, keys * sizeof(float));
    }
    for (int64_t r = 0; r < rows;) {
      // Rows before the first token that sees this block have nothing to do.
      const int64_t left = rows - r;
      const int64_t length = a.lengths[tile.b];
      const int64_t count = left >= 4 ? 4 : 1;
      int64_t first, last, reach = 0;
      for (int64_t i = 0; i < count; ++i) {
        Visible(a, length + tile.t0 + (r + i) / tile.group, &first, &last);
        if (first < j + keys) reach = std::max(reach, std::min(last - j, keys));
      }
      if (reach <= 0) {
        r += count;
        continue;
      }
      if (count == 4)
        Scores<4>(q + r * h, h, kt, h, scores);
      else
        Scores<1>(q + r * h, h, kt, h, scores);
      float decay[4];
      for (int64_t i = 0; i < count; ++i) {
        Visible(a, length + tile.t0 + (r + i) / tile.group, &first, &last);
        decay[i] = Softmax(a, scores + i * kKeys, first - j, std::min(last - j, keys), scaled ? scales : nullptr,
                           scaled ? scales + kKeys : nullptr, &states[r + i]);
      }
      // Only keys some row sees are read: rows of the cache beyond them may hold anything.
      if (count == 4)
        MixAll<4>(scores, decay, block, padded, reach, out + r * padded, padded);
      else
        MixAll<1>(scores, decay, block, padded, reach, out + r * padded, padded);
      r += count;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (tile.splits > 1) {
      float* to = partial + ((tile.b * a.heads + n0 + r) * tile.splits + tile.split) * (h + 2);
      to[0] = states[r].top;
      to[1] = states[r].total;
      std::memcpy(to + 2, out + r * padded, h * sizeof(float));
      continue;
    }
    const int64_t t = tile.t0 + r / tile.group, n = n0 + r % tile.group;
    float* to = a.out + ((tile.b * a.tokens + t) * a.heads + n) * h;
    const float inverse = 1 / std::max(states[r].total, 1e-30f);
    for (int64_t c = 0; c < h; ++c) to[c] = out[r * padded + c] * inverse;
    if (std::isnan(states[r].total)) std::fill(to, to + h, NAN);
  }
}

int64_t Tasks(const Attention& a) {
  const int64_t step = TokensInTile(a);
  return a.batch * a.kv_heads * ((a.tokens + step - 1) / step) * Splits(a);
}

int64_t PartialFloats(const Attention& a) {
  const int64_t splits = Splits(a);
  return splits > 1 ? a.batch * a.heads * splits * (a.head_dim + 2) : 0;
}

void RunAny(const Attention& a, int64_t task, float* partial) {
  switch (a.stored) {
    case Stored::kFloat32: return Run<float>(a, task, partial);
    case Stored::kBfloat16: return Run<uint16_t>(a, task, partial);
    case Stored::kInt8: return Run<int8_t>(a, task, partial);
  }
}

void Merge(const Attention& a, const float* partial) {
  const int64_t splits = Splits(a), h = a.head_dim;
  if (splits == 1) return;
  for (int64_t i = 0; i < a.batch * a.heads; ++i) {
    const float* from = partial + i * splits * (h + 2);
    float* to = a.out + i * h;
    float top = kMasked, total = 0;
    for (int64_t s = 0; s < splits; ++s) top = std::max(top, from[s * (h + 2)]);
    std::fill(to, to + h, 0.0f);
    for (int64_t s = 0; s < splits; ++s) {
      const float* part = from + s * (h + 2);
      const float weight = std::exp(part[0] - top);
      total += part[1] * weight;
      for (int64_t c = 0; c < h; ++c) to[c] += part[2 + c] * weight;
    }
    const float inverse = std::isnan(total) ? NAN : 1 / std::max(total, 1e-30f);
    for (int64_t c = 0; c < h; ++c) to[c] *= inverse;
  }
}

}  // namespace

#if defined(__AVX512F__)
const AttentionKernels& Avx512AttentionKernels() {
#elif defined(__AVX2__)
const AttentionKernels& Avx2AttentionKernels() {
#else
const AttentionKernels& PortableAttentionKernels() {
#endif
  static const AttentionKernels kernels = {Tasks, PartialFloats, RunAny, Merge};
  return kernels;
}

}  // namespace jaxchat
