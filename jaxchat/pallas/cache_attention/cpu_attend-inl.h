// Grouped-query attention of new tokens over the KV cache, with an online softmax over blocks of keys.
//
// The source of each instruction set includes it. A tile holds every query head of one key/value head for a few tokens. Many tokens:
// a block of keys, turned to [H, keys] once, serves all of them. A decode step has few rows, and its keys and values
// come from memory: keys are read as they lie, and the next block is asked for while this one is worked on.
#pragma once
#include "../cpu_steps-inl.h"
#include "../cpu_target.h"
#include "../cpu_vectors-inl.h"
#include "cpu_kernels.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

constexpr int64_t kKeys = 64;       // keys in a block
constexpr int kVectors = kKeys / kLanes;
#if JAXCHAT_ISA == JAXCHAT_AVX512 || defined(__aarch64__)
constexpr int kWide = 4;            // vectors of sums that four rows keep in registers: these have 32
#else
constexpr int kWide = 2;
#endif
constexpr int64_t kRows = 64;       // query rows in a tile, about
constexpr int kMost = 4;            // of them that meet a block at a time
constexpr int64_t kSplit = 512;     // keys that one task of a decode step takes
constexpr float kMasked = -1e30f;   // finite: a block without a visible key gives 0, not NaN

inline Floats LoadFloats(const float* p) { return Load<Floats>(p); }
inline Floats LoadFloats(const uint16_t* p) { return WidenBfloat16(Load<Halves>(p)); }
inline Floats LoadFloats(const int8_t* p) { return ToFloats(WidenBytes(p)); }
inline float Widen(float x) { return x; }
inline float Widen(int8_t x) { return x; }
inline float Widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

// exp to about 1e-7 relative (Cephes' polynomial); 0 below -87; NaN stays NaN.
inline Floats Exp(Floats x) {
  const Ints tiny = x < -87.0f;
  x = x > 88.0f ? Splat(88.0f) : x;
  x = tiny ? Splat(-87.0f) : x;
  const Floats magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = Splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Ints power = ((bits - 0x4b400000) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  y = y * scale;
  return tiny ? Floats{} : y;
}

inline Floats Softcap(Floats x, float cap) {
  const Floats e = Exp(x * (2.0f / cap));
  return cap * (1.0f - 2.0f / (e + 1.0f));
}

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where a task is in the problem.
struct Tile {
  int64_t b, kv, t0, t1, split, splits;
  int64_t position;     // of the first token
  int64_t group;        // query heads of a key/value head
  int64_t begin, end;   // keys
};

int64_t TokensInTile(const Attention& a) {
  if (a.ancestors != nullptr) return 1;
  return std::min(a.tokens, std::max<int64_t>(1, kRows / (a.heads / a.kv_heads)));
}

// A decode step is split along the keys too: few heads alone would not occupy the cores. A tree's tokens are as many
// decode steps, each of which adds up what it sees as if there were no tree: to the last bit, so that quantized weights
// meet the same numbers behind it.
int64_t Splits(const Attention& a) {
  if (a.tokens > 1 && a.ancestors == nullptr) return 1;
  int64_t deepest = 0;
  if (a.ancestors != nullptr) deepest = *std::max_element(a.depths, a.depths + a.batch * a.tokens);
  return (*std::max_element(a.lengths, a.lengths + a.batch) + deepest + kSplit) / kSplit;
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
  tile.position = a.lengths[tile.b] + (a.ancestors == nullptr ? tile.t0 : a.depths[tile.b * a.tokens + tile.t0]);
  tile.begin = a.window ? std::max<int64_t>(0, tile.position - a.window + 1) : 0;
  tile.end = std::min(a.capacity, tile.position + tile.t1 - tile.t0);
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

// [keys, H] -> [H, 64]; missing keys are zero.
template <typename T>
void TransposeKeys(const T* k, int64_t h, int64_t keys, float* out) {
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    int64_t i = 0;
    for (; keys - j >= kLanes && i + kLanes <= h; i += kLanes) {
      Floats rows[kLanes];
      for (int r = 0; r < kLanes; ++r) rows[r] = LoadFloats(k + (j + r) * h + i);
      Transpose(rows);
      for (int c = 0; c < kLanes; ++c) Store(out + (i + c) * kKeys + j, rows[c]);
    }
    for (; i < h; ++i)
      for (int64_t r = 0; r < kLanes; ++r) out[i * kKeys + j + r] = j + r < keys ? Widen(k[(j + r) * h + i]) : 0.0f;
  }
}

// [keys, H] -> float32 [keys, padded], zeros behind.
template <typename T>
void WidenRows(const T* v, int64_t h, int64_t keys, int64_t padded, float* out) {
  for (int64_t i = 0; i < keys; ++i, v += h, out += padded) {
    int64_t c = 0;
    for (; c + kLanes <= h; c += kLanes) Store(out + c, LoadFloats(v + c));
    for (; c < padded; ++c) out[c] = c < h ? Widen(v[c]) : 0.0f;
  }
}

// Asks for the block behind this one, evenly while `visits` read this one as float32: a processor waits for no more
// than some twenty lines at once.
class Ahead {
 public:
  template <typename T>
  Ahead(const T* from, int64_t visits)
      : at_(reinterpret_cast<const char*>(from)), rate_((int64_t{sizeof(T)} << 16) / (4 * visits)) {}
  // A step reads so many bytes of float32.
  template <int64_t bytes>
  void Step() {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at_ + i, 0, 2);  // to the second level
    at_ += bytes * rate_ >> 16;
  }

 private:
  const char* at_;
  int64_t rate_;  // bytes ahead for one read, times 2^16
};

// For many rows, which find most of the cache where the rows before left it.
struct Nothing {
  Nothing(const void*, int64_t) {}
  template <int64_t bytes>
  void Step() {}
};

// scores[rows, 64] = q[rows, H] @ kt[H, 64]
template <int R>
void Scores(const float* q, int64_t stride, const float* kt, int64_t h, float* scores) {
  for (int64_t j = 0; j < kKeys; j += kWide * kLanes) {
    Floats acc[R][kWide] = {};
    for (int64_t i = 0; i < h; ++i) {
      Floats k[kWide];
      for (int c = 0; c < kWide; ++c) k[c] = Load<Floats>(kt + i * kKeys + j + c * kLanes);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kWide; ++c) acc[r][c] += q[r * stride + i] * k[c];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kWide; ++c) Store(scores + r * kKeys + j + c * kLanes, acc[r][c]);
  }
}

// So many keys at a time meet R rows: their sums fill kLanes vectors, or nearly.
template <int R>
constexpr int kAtOnce = kLanes / R;

// scores[rows, keys] = q[rows, H] @ k[keys, H].T
template <int R, typename T>
void Dots(const float* q, int64_t stride, const T* k, int64_t h, int64_t keys, float* scores, Ahead* state) {
  constexpr int C = kAtOnce<R>;
  Ahead next = *state;
  for (int64_t j = 0; j < keys; j += C) {
    const T* rows[C];
    for (int c = 0; c < C; ++c) rows[c] = k + std::min(j + c, keys - 1) * h;  // beyond the end: the last again
    Floats acc[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= h; i += kLanes) {
      next.Step<C * kBytes>();
      Floats key[C];
      for (int c = 0; c < C; ++c) key[c] = LoadFloats(rows[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Floats x = Load<Floats>(q + r * stride + i);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) acc[r * C + c] += x * key[c];
      }
    }
    Floats sums = SumEach(acc);
    if (i < h)
      for (int n = 0; n < R * C; ++n)
        for (int64_t rest = i; rest < h; ++rest) sums[n] += q[n / C * stride + rest] * Widen(rows[n % C][rest]);
    float each[kLanes];
    Store(each, sums);
    // A constant where it can be: copying so many bytes is no call then.
    const int count = kKeys % C == 0 ? C : static_cast<int>(std::min<int64_t>(C, kKeys - j));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kKeys + j, each + r * C, count * sizeof(float));
  }
  *state = next;
}

// out[rows, W vectors of columns] = decay * out + p[rows, keys] @ v[keys, ...]
template <int R, int W, typename Next>
void Mix(const float* p, const float* decay, const float* v, int64_t v_stride, int64_t keys, float* out,
         int64_t stride, Next* state) {
  Next next = *state;
  Floats acc[R][W];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < W; ++c) acc[r][c] = Load<Floats>(out + r * stride + c * kLanes) * decay[r];
  for (int64_t j = 0; j < keys; ++j) {
    next.template Step<W * kBytes>();
    Floats row[W];
    for (int c = 0; c < W; ++c) row[c] = Load<Floats>(v + j * v_stride + c * kLanes);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < W; ++c) acc[r][c] += p[r * kKeys + j] * row[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < W; ++c) Store(out + r * stride + c * kLanes, acc[r][c]);
  *state = next;
}

// W vectors at a time, then one.
template <int R, typename Next>
void MixAll(const float* p, const float* decay, const float* v, int64_t v_stride, int64_t keys, float* out,
            int64_t padded, Next* next) {
  constexpr int W = R == 1 ? 2 * kWide : kWide;
  int64_t c = 0;
  for (; c + W * kLanes <= padded; c += W * kLanes)
    Mix<R, W>(p, decay, v + c, v_stride, keys, out + c, padded, next);
  for (; c < padded; c += kLanes) Mix<R, 1>(p, decay, v + c, v_stride, keys, out + c, padded, next);
}

struct Row {
  float top, total;
};

// Turns a row of scores into weights, updates its running maximum and sum, returns what to scale its output by.
// The scales of int8 keys multiply the scores, those of int8 values the weights; else they are null.
float Softmax(const Attention& a, float* scores, int64_t first, int64_t last, const float* k_scale,
              const float* v_scale, Row* row) {
  // Keys [first, last) of the block are visible.
  const Ints from = Ints{} + static_cast<int32_t>(std::clamp<int64_t>(first, 0, kKeys));
  const Ints to = Ints{} + static_cast<int32_t>(std::clamp<int64_t>(last, 0, kKeys));
  Ints key{};
  for (int i = 0; i < kLanes; ++i) key[i] = i;
  Floats x[kVectors];
  Floats top = Splat(kMasked);
  for (int c = 0; c < kVectors; ++c, key += kLanes) {
    x[c] = Load<Floats>(scores + c * kLanes) * a.scale;
    if (k_scale != nullptr) x[c] *= Load<Floats>(k_scale + c * kLanes);
    if (a.softcap != 0) x[c] = Softcap(x[c], a.softcap);
    x[c] = ((key >= from) & (key < to)) ? x[c] : Splat(kMasked);
    top = x[c] > top ? x[c] : top;
  }
  float best = row->top;
  for (int i = 0; i < kLanes; ++i) best = std::max(best, top[i]);
  Floats sum = {};
  for (int c = 0; c < kVectors; ++c) {
    const Floats p = x[c] == kMasked ? Floats{} : Exp(x[c] - best);
    Store(scores + c * kLanes, v_scale == nullptr ? p : p * Load<Floats>(v_scale + c * kLanes));
    sum += p;
  }
  const float decay = row->top == best ? 1.0f : std::exp(row->top - best);
  row->total = row->total * decay + Sum(sum);
  row->top = best;
  return decay;
}

// What a task works in, of a thread's own memory.
struct Scratch {
  float* q;       // [rows, H]
  float* out;     // [rows, padded]
  float* keys;    // [H, 64]
  float* values;  // [64, padded]
  float* scales;  // [2, 64], of the keys and of the values
  float* scores;  // [kMost, 64]
  float* path;    // [2, 64, H], keys and values as they are stored, of a block where a tree begins

  Scratch(int64_t rows, int64_t h, int64_t padded) {
    static thread_local std::vector<float> memory;
    float** const spans[] = {&q, &out, &keys, &values, &scales, &scores, &path};
    const int64_t sizes[] = {rows * h,      rows * padded,  h * kKeys,     kKeys * padded,
                             2 * kKeys,     kMost * kKeys,  2 * kKeys * h};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
    float* at = memory.data();
    for (int i = 0; i < 7; ++i) {
      *spans[i] = at;
      at += sizes[i];
    }
  }
};

// A tile of rows over its keys, stored as T.
template <typename T, bool kDecode>
class Task {
 public:
  Task(const Attention& a, int64_t task)
      : a_(a),
        tile_(Locate(a, task)),
        h_(a.head_dim),
        padded_(RoundUp(h_, kLanes)),
        rows_((tile_.t1 - tile_.t0) * tile_.group),
        first_head_(tile_.kv * tile_.group),
        cached_((tile_.b * a.kv_heads + tile_.kv) * a.capacity),
        k_(static_cast<const T*>(a.k) + cached_ * h_),
        v_(static_cast<const T*>(a.v) + cached_ * h_),
        scratch_(rows_, h_, padded_) {
    static thread_local std::vector<Row> states;
    states.assign(rows_, Row{kMasked, 0});
    states_ = states.data();
    for (int64_t t = tile_.t0; t < tile_.t1; ++t)
      std::memcpy(scratch_.q + (t - tile_.t0) * tile_.group * h_,
                  a.q + ((tile_.b * a.tokens + t) * a.heads + first_head_) * h_, tile_.group * h_ * sizeof(float));
    std::fill(scratch_.out, scratch_.out + rows_ * padded_, 0.0f);
  }

  void Run(float* partial) {
    for (int64_t j = tile_.begin; j < tile_.end; j += kKeys) Block(j, std::min(kKeys, tile_.end - j));
    for (int64_t r = 0; r < rows_; ++r) {
      if (tile_.splits > 1)
        FinishSplit(r, partial);
      else
        Finish(r);
    }
  }

 private:
  using Next = std::conditional_t<kDecode, Ahead, Nothing>;
  static constexpr bool kScaled = std::is_same_v<T, int8_t>;

  // Keys [j, j + keys).
  void Block(int64_t j, int64_t keys) {
    const int64_t visits = (rows_ + kMost - 1) / kMost;
    Next next_keys(k_ + (j + keys) * h_, visits), next_values(v_ + (j + keys) * h_, visits);
    const T *k = k_ + j * h_, *v = v_ + j * h_;
    if (kScaled) LoadScales(j, keys);
    if (a_.ancestors != nullptr && j + keys > a_.lengths[tile_.b]) FollowPath(j, keys, &k, &v);
    if (!kDecode) TransposeKeys(k, h_, keys, scratch_.keys);
    const float* values = Values(v, keys);
    InSteps<kMost>(rows_, [&](auto count, int64_t r) {
      Visit<decltype(count)::value>(r, j, keys, k, values, &next_keys, &next_values);
    });
  }

  // Where a tree begins: the keys and values of the positions [j, j + keys) on the path that leads to the token.
  void FollowPath(int64_t j, int64_t keys, const T** k, const T** v) {
    T* const to_k = reinterpret_cast<T*>(scratch_.path);
    T* const to_v = to_k + kKeys * h_;
    const int64_t length = a_.lengths[tile_.b], first = tile_.b * a_.tokens;
    const uint32_t leads = static_cast<uint32_t>(a_.ancestors[first + tile_.t0]);
    for (int64_t i = 0, token = 0; i < keys; ++i) {
      int64_t row = j + i;
      if (row >= length) {  // tokens stand behind their parents: so do depths
        while (token < a_.tokens && !((leads >> token & 1) != 0 && a_.depths[first + token] == row - length)) ++token;
        row = std::min(length + token, a_.capacity - 1);  // padding may lie beyond
      }
      std::memcpy(to_k + i * h_, k_ + row * h_, h_ * sizeof(T));
      std::memcpy(to_v + i * h_, v_ + row * h_, h_ * sizeof(T));
      if (kScaled) {
        scratch_.scales[i] = a_.k_scale[cached_ + row];
        scratch_.scales[kKeys + i] = a_.v_scale[cached_ + row];
      }
    }
    *k = to_k;
    *v = to_v;
  }

  // float32 [keys, padded]. A cache of that whose rows fill whole vectors is read in place.
  const float* Values(const T* v, int64_t keys) {
    if (std::is_same_v<T, float> && padded_ == h_) return reinterpret_cast<const float*>(v);
    WidenRows(v, h_, keys, padded_, scratch_.values);
    return scratch_.values;
  }

  // What lies beyond the keys in use is nobody's.
  void LoadScales(int64_t j, int64_t keys) {
    std::fill(scratch_.scales, scratch_.scales + 2 * kKeys, 0.0f);
    std::memcpy(scratch_.scales, a_.k_scale + cached_ + j, keys * sizeof(float));
    std::memcpy(scratch_.scales + kKeys, a_.v_scale + cached_ + j, keys * sizeof(float));
  }

  // The token that row r asks for.
  int64_t Position(int64_t r) const { return tile_.position + r / tile_.group; }

  // How many of the block's keys the last of R rows that sees any sees; 0: none of them does.
  template <int R>
  int64_t Reach(int64_t r, int64_t j, int64_t keys) const {
    int64_t first, last, reach = 0;
    for (int64_t i = 0; i < R; ++i) {
      Visible(a_, Position(r + i), &first, &last);
      if (first < j + keys) reach = std::max(reach, std::min(last - j, keys));
    }
    return reach;
  }

  // R rows meet a block.
  template <int R>
  void Visit(int64_t r, int64_t j, int64_t keys, const T* k, const float* values, Next* next_keys,
             Next* next_values) {
    const int64_t reach = Reach<R>(r, j, keys);
    // Rows before the first token that sees this block have nothing to do.
    if (reach <= 0) return;
    if constexpr (kDecode)
      Dots<R>(scratch_.q + r * h_, h_, k, h_, keys, scratch_.scores, next_keys);
    else
      Scores<R>(scratch_.q + r * h_, h_, scratch_.keys, h_, scratch_.scores);
    float decay[R];
    for (int64_t i = 0; i < R; ++i) {
      int64_t first, last;
      Visible(a_, Position(r + i), &first, &last);
      decay[i] = Softmax(a_, scratch_.scores + i * kKeys, first - j, std::min(last - j, keys),
                         kScaled ? scratch_.scales : nullptr, kScaled ? scratch_.scales + kKeys : nullptr,
                         states_ + r + i);
    }
    // Only keys some row sees are read: rows of the cache beyond them may hold anything.
    MixAll<R>(scratch_.scores, decay, values, padded_, reach, scratch_.out + r * padded_, padded_, next_values);
  }

  // A decode step's row, for `Merge`.
  void FinishSplit(int64_t r, float* partial) const {
    const int64_t row = (tile_.b * a_.tokens + tile_.t0) * a_.heads + first_head_ + r;
    float* to = partial + (row * tile_.splits + tile_.split) * (h_ + 2);
    to[0] = states_[r].top;
    to[1] = states_[r].total;
    std::memcpy(to + 2, scratch_.out + r * padded_, h_ * sizeof(float));
  }

  void Finish(int64_t r) const {
    const int64_t t = tile_.t0 + r / tile_.group, n = first_head_ + r % tile_.group;
    float* to = a_.out + ((tile_.b * a_.tokens + t) * a_.heads + n) * h_;
    const float inverse = 1 / std::max(states_[r].total, 1e-30f);
    for (int64_t c = 0; c < h_; ++c) to[c] = scratch_.out[r * padded_ + c] * inverse;
    if (std::isnan(states_[r].total)) std::fill(to, to + h_, NAN);
  }

  const Attention& a_;
  const Tile tile_;
  const int64_t h_, padded_, rows_, first_head_;
  const int64_t cached_;  // where its rows of the cache begin
  const T *k_, *v_;
  const Scratch scratch_;
  Row* states_;
};

int64_t Tasks(const Attention& a) {
  const int64_t step = TokensInTile(a);
  return a.batch * a.kv_heads * ((a.tokens + step - 1) / step) * Splits(a);
}

int64_t PartialFloats(const Attention& a) {
  const int64_t splits = Splits(a);
  return splits > 1 ? a.batch * a.tokens * a.heads * splits * (a.head_dim + 2) : 0;
}

template <typename T>
void Run(const Attention& a, int64_t task, float* partial) {
  if (a.tokens == 1 || a.ancestors != nullptr) return Task<T, true>(a, task).Run(partial);
  Task<T, false>(a, task).Run(partial);
}

void Merge(const Attention& a, const float* partial) {
  const int64_t splits = Splits(a), h = a.head_dim;
  if (splits == 1) return;
  for (int64_t i = 0; i < a.batch * a.tokens * a.heads; ++i) {
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

const AttentionTable kAttention = {{
    {Tasks, PartialFloats, Run<float>, Merge},
    {Tasks, PartialFloats, Run<uint16_t>, Merge},
    {Tasks, PartialFloats, Run<int8_t>, Merge},
}};

}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
