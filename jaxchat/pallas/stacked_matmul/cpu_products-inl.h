// What the kernels of all instruction sets share: activations as integers, how weights meet them, and the table.
#pragma once
#include "../cpu_steps-inl.h"
#include "../cpu_target.h"
#include "../cpu_vectors-inl.h"
#include "cpu_floats-inl.h"
#include "cpu_kernels.h"

JAXCHAT_BEGIN
namespace jaxchat::JAXCHAT_NAMESPACE {
namespace {

// ---------------------------------------------------------------- activations as integers

constexpr int64_t kRun = 32;  // columns whose codes are packed together, and most that share a scale of x

// Columns of x that share a scale, whatever the weights' group: no more than that.
constexpr int64_t SubOf(int bits) { return bits == 6 ? 16 : kRun; }

// So many activations as integers, with their scale and sums.
template <int64_t kSub>
struct Quantized {
  static constexpr int64_t kVectors = kSub / kLanes;
  Ints q[kVectors];
  int32_t total;  // of the integers
  float scale;
  float sum;  // of the values as these integers say them, for affine weights: whose offset and codes are off by much
              // the same then, and cancel; half the error that the exact sum would leave

  int32_t At(int64_t column) const { return q[column / kLanes][column % kLanes]; }
};

// Integers up to `steps`. `count` values are real, the others zero. NaN and infinity make the scale NaN.
template <int64_t kSub>
inline Quantized<kSub> Quantize(const float* from, int64_t count, float steps) {
  float padded[kSub] = {};
  if (count < kSub) {
    if (count > 0) std::memcpy(padded, from, count * sizeof(float));
    from = padded;
  }
  Ints top{}, total{};
  for (int64_t i = 0; i < kSub; i += kLanes) {
    // Magnitudes compare like their bits, which puts NaN on top.
    const Ints magnitude = Load<Ints>(from + i) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, top[i]);
  const float largest = Bits<float>(bits);
  const bool finite = bits < 0x7f800000, nonzero = largest > 1e-30f;
  const float inverse = finite && nonzero ? steps / largest : 0.0f;
  Quantized<kSub> out;
  for (int64_t i = 0; i < kSub / kLanes; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; NaN leaves some, and its scale is NaN.
    const Floats shifted = Load<Floats>(from + i * kLanes) * inverse + 12582912.0f;
    out.q[i] = (Bits<Ints>(shifted) & 0x7fffff) - 0x400000;
    total += out.q[i];
  }
  out.total = Sum(total);
  out.scale = !finite ? std::numeric_limits<float>::quiet_NaN() : nonzero ? largest / steps : 0.0f;
  out.sum = out.scale * static_cast<float>(out.total);
  return out;
}

// ---------------------------------------------------------------- quantized weights

// Bytes of the codes of some columns: the low 4 bits below 8, and what is above them.
template <int kBits>
constexpr int64_t CodeBytes(int64_t columns) {
  return kBits == 8 ? columns : columns / 2;
}
template <int kBits>
constexpr int64_t HighBytes(int64_t columns) {
  return kBits == 8 ? 0 : columns * (kBits - 4) / 8;
}

template <int kBits>
inline const uint8_t* Codes(const Weights& w, int64_t row, int64_t column = 0) {
  return static_cast<const uint8_t*>(w.codes) + row * CodeBytes<kBits>(w.cols) + CodeBytes<kBits>(column);
}
template <int kBits>
inline const uint8_t* High(const Weights& w, int64_t row, int64_t column = 0) {
  return static_cast<const uint8_t*>(w.high) + row * HighBytes<kBits>(w.cols) + HighBytes<kBits>(column);
}

// What unsigned codes are more than what they stand for.
constexpr int LiftOf(int bits, bool affine) { return affine ? 0 : 1 << (bits - 1); }

inline float Half(uint16_t bits) { return WidenHalf(Halves{bits})[0]; }

// The scales (or minimums) of rows of weights, one per `sub` columns.
class Groups {
 public:
  Groups(const Weights& w, const void* values, const void* outer, int64_t sub)
      : values_(values), outer_(static_cast<const uint16_t*>(outer)), type_(w.scale_type),
        per_row_(w.cols / w.group), shift_(0), per_outer_(kSuper / sub), outers_(w.cols / kSuper) {
    // Groups are 32, 64 or 128 columns, or the row; of integers, `sub`.
    while (w.cols > w.group ? (sub << shift_) < w.group : (w.cols / sub) >> shift_ > 0) ++shift_;
  }
  // Whether there is a float16 for each `sub` columns, or an integer.
  bool plain() const { return shift_ == 0 && type_ == ScaleType::kHalf; }
  bool integers() const { return type_ == ScaleType::kInt8; }
  const uint16_t* Plain(int64_t row, int64_t sub) const {
    return static_cast<const uint16_t*>(values_) + row * per_row_ + sub;
  }
  const int8_t* Integers(int64_t row, int64_t sub) const {
    return static_cast<const int8_t*>(values_) + row * per_row_ + sub;
  }
  // The float16 that a row's integers are times, one per 256 columns.
  const uint16_t* Outer(int64_t row, int64_t sub) const { return outer_ + row * outers_ + sub / per_outer_; }
  float At(int64_t row, int64_t sub) const {
    const int64_t i = row * per_row_ + (sub >> shift_);
    switch (type_) {
      case ScaleType::kFloat: return static_cast<const float*>(values_)[i];
      case ScaleType::kHalf: return Half(static_cast<const uint16_t*>(values_)[i]);
      default: return static_cast<const int8_t*>(values_)[i] * Half(*Outer(row, sub));
    }
  }

 private:
  static constexpr int64_t kSuper = 256;
  const void* values_;
  const uint16_t* outer_;
  ScaleType type_;
  int64_t per_row_;
  int shift_;
  int64_t per_outer_, outers_;
};

template <int kBits>
inline Groups ScalesOf(const Weights& w) {
  return Groups(w, w.scales, w.super_scales, SubOf(kBits));
}
template <int kBits>
inline Groups MinsOf(const Weights& w) {
  return Groups(w, w.mins, w.super_mins, SubOf(kBits));
}

// A sum over columns from `from` on: added to what those before came to.
inline void Put(float sum, int64_t from, float* y) { *y = from > 0 ? *y + sum : sum; }

// ---------------------------------------------------------------- a few rows of x

// What a table has for a few rows of x and quantized weights, which are read once, in order. Few says how they meet:
//   kBits: of the weights.
//   kMost: rows of x that a row of weights meets at a time.
//   Block: some columns of a row of x, in the order in which the codes meet them; Blocks(w): how many a row has.
//   Prepare(w, x, rows, blocks): makes those of one row of x, of so many that meet the weights together.
//   Row<M>(w, scales, mins, x, row, from, to, y): blocks [from, to) of M rows of x times a row of weights.
template <typename Few>
struct FewRows {
  using Block = typename Few::Block;

  static int64_t Bytes(const Weights& w, int64_t m) {
    return m * Few::Blocks(w) * static_cast<int64_t>(sizeof(Block));
  }

  static void Prepare(const Weights& w, const float* x, int64_t m, void* out) {
    auto* blocks = static_cast<Block*>(out);
    InSteps<Few::kMost>(m, [&](auto count, int64_t first) {
      constexpr int64_t kCount = decltype(count)::value;
      for (int64_t i = first; i < first + kCount; ++i)
        Few::Prepare(w, x + i * w.inputs, kCount, blocks + i * Few::Blocks(w));
    });
  }

  // So many rows and blocks of x stay in the first-level cache while a few rows of the weights, in the second, pass by.
  static void Run(const Weights& w, const float*, const void* prepared, int64_t m, float* y, int64_t begin,
                  int64_t end) {
    constexpr int64_t kCache = 32768, kWeightRows = 32;
    const auto* x = static_cast<const Block*>(prepared);
    const int64_t blocks = Few::Blocks(w);
    const Groups scales = ScalesOf<Few::kBits>(w), mins = MinsOf<Few::kBits>(w);
    for (int64_t first = begin; first < end; first += kWeightRows)
      InSteps<Few::kMost>(m, [&](auto count, int64_t i) {
        constexpr int kCount = decltype(count)::value;
        const int64_t fits = kCache / static_cast<int64_t>(sizeof(Block)) / kCount;
        const int64_t step = kCount == 1 ? blocks : std::max<int64_t>(1, fits);
        for (int64_t b = 0; b < blocks; b += step)
          for (int64_t row = first; row < std::min(first + kWeightRows, end); ++row)
            Few::template Row<kCount>(w, scales, mins, x + i * blocks, row, b, std::min(b + step, blocks),
                                      y + i * w.rows);
      });
  }
};

// ---------------------------------------------------------------- many rows of x

// What a table has for many rows of x and quantized weights: a tile of weight rows is unpacked once and meets all of x
// from the cache. Tile says how:
//   kBits, kAffine: of the weights; whether they have minimums.
//   kRows: weight rows in a tile, whole vectors of sums; kPart: columns of it.
//   kMost: rows of x that a tile meets at a time. kPanel: so many rows of x lie side by side, columns that share a scale
//     after columns that do: 1, or kMost, which zeros behind the last row fill up.
//   kLevels: x becomes integers up to this. Input, kInputs: what a sub-group of them becomes.
//   Code, kCodes: what a sub-group of codes of a row becomes.
//   Prepare(x, lane, panel): writes a sub-group of x, row `lane` of a panel; returns what their sums start from, to take
//     back a lift of the codes.
//   Pack(w, rows, from, to, out): writes the codes of columns [from, to) of kRows weight rows.
//   Products<M>(codes, x, stride, starts, sums): those of a sub-group of a tile and M rows of x, `stride` apart.
template <typename Tile>
struct TiledRows {
  using Code = typename Tile::Code;
  using Input = typename Tile::Input;
  static constexpr int64_t kRows = Tile::kRows, kPanel = Tile::kPanel, kSub = SubOf(Tile::kBits);
  static constexpr int kVectors = kRows / kLanes;
  static_assert(kPanel == 1 || kPanel == Tile::kMost);

  // Prepared x: panels, sub-group after sub-group, and for each of those numbers of all their rows.
  struct Inputs {
    Input* q;
    float* scale;
    float* sum;  // of the values, for affine weights
    int32_t* start;
  };

  // Part of a tile, sub-group after sub-group: codes, and for all rows scales and minimums.
  struct Packed {
    Code* codes;
    float* scale;
    float* min;
  };

  static int64_t Bytes(const Weights& w, int64_t m) {
    return Padded(m) * (w.cols / kSub) * static_cast<int64_t>(Tile::kInputs * sizeof(Input) + 12);
  }

  static void Prepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
    const Inputs to = InputsIn(w, out, m);
    const int64_t subs = w.cols / kSub;
    for (int64_t i = begin; i < (end == m ? Padded(m) : end); ++i)
      for (int64_t s = 0; s < subs; ++s) {
        const int64_t panel = i / kPanel * subs + s, lane = i % kPanel, at = panel * kPanel + lane;
        const auto sub =
            Quantize<kSub>(x + i * w.inputs + s * kSub, i < m ? w.inputs - s * kSub : 0, Tile::kLevels);
        to.start[at] = Tile::Prepare(sub, lane, to.q + panel * kPanel * Tile::kInputs);
        to.scale[at] = sub.scale;
        to.sum[at] = sub.sum;
      }
  }

  static int64_t ScratchBytes(const Weights& w) {
    return Subs(w) * kRows * static_cast<int64_t>(Tile::kCodes * sizeof(Code) + 8);
  }

  static void Run(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end,
                  void* scratch) {
    const Inputs x = InputsIn(w, const_cast<void*>(prepared), m);
    auto* codes = static_cast<Code*>(scratch);
    auto* scale = reinterpret_cast<float*>(codes + Subs(w) * kRows * Tile::kCodes);
    const Packed tile = {codes, scale, scale + Subs(w) * kRows};
    const Groups scales = ScalesOf<Tile::kBits>(w), mins = MinsOf<Tile::kBits>(w);
    for (int64_t from = 0; from < w.cols; from += Tile::kPart) {
      const int64_t to = std::min(from + Tile::kPart, w.cols);
      for (int64_t row = begin; row < end; row += kRows) {
        int64_t rows[kRows];
        for (int64_t r = 0; r < kRows; ++r) rows[r] = std::min(row + r, w.rows - 1);  // past the end: the last again
        Tile::Pack(w, rows, from, to, tile.codes);
        PackScales(scales, rows, from / kSub, to / kSub, tile.scale);
        if constexpr (Tile::kAffine) PackScales(mins, rows, from / kSub, to / kSub, tile.min);
        InSteps<Tile::kMost, kPanel>(Padded(m), [&](auto count, int64_t i) {
          Multiply<decltype(count)::value>(w, x, tile, i, m, from, to, y + row, std::min(kRows, end - row));
        });
      }
    }
  }

 private:
  static int64_t Padded(int64_t m) { return (m + kPanel - 1) / kPanel * kPanel; }

  static int64_t Subs(const Weights& w) { return std::min(Tile::kPart, w.cols) / kSub; }

  static Inputs InputsIn(const Weights& w, void* prepared, int64_t m) {
    const int64_t count = Padded(m) * (w.cols / kSub);
    auto* q = static_cast<Input*>(prepared);
    auto* scale = reinterpret_cast<float*>(q + count * Tile::kInputs);
    return {q, scale, scale + count, reinterpret_cast<int32_t*>(scale + 2 * count)};
  }

  // The scales (or minimums) of sub-groups [from, to), to out[sub-group][row].
  static void PackScales(const Groups& groups, const int64_t* rows, int64_t from, int64_t to, float* out) {
    for (int64_t r = 0; r < kRows; r += kLanes, rows += kLanes, out += kLanes) {
      int64_t s = from;
      if (groups.plain())
        for (; s + kLanes <= to; s += kLanes) {
          Floats block[kLanes];
          for (int i = 0; i < kLanes; ++i) block[i] = WidenHalf(Load<Halves>(groups.Plain(rows[i], s)));
          Transpose(block);
          for (int i = 0; i < kLanes; ++i) Store(out + (s - from + i) * kRows, block[i]);
        }
      for (; s < to; ++s)
        for (int i = 0; i < kLanes; ++i) out[(s - from) * kRows + i] = groups.At(rows[i], s);
    }
  }

  // Columns [from, to) of M rows of x from i on times a tile, to `count` columns of y: added to what is there, unless
  // these are the first columns. Rows from m on are padding.
  template <int M>
  __attribute__((noinline)) static void Multiply(const Weights& w, const Inputs& x, const Packed& tile, int64_t i,
                                                 int64_t m, int64_t from, int64_t to, float* y, int64_t count) {
    const int64_t subs = w.cols / kSub, first = i / kPanel * subs + from / kSub;
    const int64_t stride = kPanel == 1 ? subs : 1;  // between rows of x, in what belongs to 32 columns
    const Code* codes = tile.codes;
    const Input* q = x.q + first * kPanel * Tile::kInputs;
    const float *x_scale = x.scale + first * kPanel, *x_sum = x.sum + first * kPanel;
    const int32_t* start = x.start + first * kPanel;
    const float *scale = tile.scale, *min = tile.min;
    Floats acc[M][kVectors] = {};
    for (int64_t s = from / kSub; s < to / kSub; ++s) {
      int32_t starts[M];
      for (int r = 0; r < M; ++r) starts[r] = start[r * stride];
      Ints sums[M][kVectors];
      Tile::template Products<M>(codes, q, subs * Tile::kInputs, starts, sums);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] += ToFloats(sums[r][v]) * (Load<Floats>(scale + v * kLanes) * x_scale[r * stride]);
          if constexpr (Tile::kAffine) acc[r][v] += Load<Floats>(min + v * kLanes) * x_sum[r * stride];
        }
      codes += kRows * Tile::kCodes;
      q += kPanel * Tile::kInputs;
      x_scale += kPanel;
      x_sum += kPanel;
      start += kPanel;
      scale += kRows;
      min += kRows;
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      if (i + r >= m) break;
      float results[kRows];
      for (int v = 0; v < kVectors; ++v) Store(results + v * kLanes, acc[r][v]);
      for (int64_t c = 0; c < count; ++c) Put(results[c], from, y + (i + r) * w.rows + c);
    }
  }
};

// ---------------------------------------------------------------- the table

template <typename Rows>
constexpr FewKernel kFew = {Rows::Bytes, Rows::Prepare, Rows::Run};

template <typename Rows>
constexpr ManyKernel kMany = {Rows::Bytes, Rows::Prepare, Rows::Run, Rows::ScratchBytes};

template <typename Few, typename Tile>
constexpr Kernels kQuantized = {kFew<FewRows<Few>>, kMany<TiledRows<Tile>>};

// Few<bits, affine> and Tile<bits, affine> are an instruction set's; many rows of x meet bfloat16 weights in `many`.
template <template <int, bool> class Few, template <int, bool> class Tile>
constexpr KernelTable TableOf(const ManyKernel& many) {
  KernelTable table{};
  table[Kind::kFloat32] = {kFew<FloatRows<Kind::kFloat32>>, {}};
  table[Kind::kBfloat16] = {kFew<SplitRows>, many};
  table[Kind::kFloat16] = {kFew<FloatRows<Kind::kFloat16>>, {}};
  table[Kind::kInt8] = kQuantized<Few<8, false>, Tile<8, false>>;
  table[Kind::kInt8Affine] = kQuantized<Few<8, true>, Tile<8, true>>;
  table[Kind::kInt4] = kQuantized<Few<4, false>, Tile<4, false>>;
  table[Kind::kInt4Affine] = kQuantized<Few<4, true>, Tile<4, true>>;
  table[Kind::kInt5] = kQuantized<Few<5, false>, Tile<5, false>>;
  table[Kind::kInt5Affine] = kQuantized<Few<5, true>, Tile<5, true>>;
  table[Kind::kInt6] = kQuantized<Few<6, false>, Tile<6, false>>;
  return table;
}

}  // namespace
}  // namespace jaxchat::JAXCHAT_NAMESPACE
JAXCHAT_END
