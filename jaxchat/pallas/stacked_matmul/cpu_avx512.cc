// x @ w.T for quantized and float weights on AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// One row of x: reading the weights is all that matters, and they are read once, in order. Activations are
// split into two signed bytes, q = 128 h + l (15 bits), so that VNNI's exact integer products lose nothing that
// shows: the weights' unsigned bytes (code + 8 or + 128) meet h and l, and the offset's share is taken back as
// one number per group. Many rows of x: a register tile of 32 weight rows.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu_kernels.h"

namespace jaxchat {
namespace {

constexpr int64_t kSub = 32;  // activations are scaled per 32 columns, whatever the weights' group

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

float LoadScale(const void* p, int64_t i, bool wide) {
  return wide ? static_cast<const float*>(p)[i]
              : _cvtsh_ss(static_cast<const uint16_t*>(p)[i]);
}

// Calls visit(count, i, row) for every row of the weights and every four (`count`) rows of x from i on. Those four
// stay in the first-level cache while a few rows of the weights, in the second, pass by.
template <typename Visit>
void ForRowsInBlocks(int64_t m, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t last = std::min(first + 32, end);
    for (int64_t i = 0; i < m; i += 4) {
      for (int64_t row = first; row < last; ++row) {
        switch (std::min<int64_t>(4, m - i)) {
          case 4: visit(std::integral_constant<int, 4>(), i, row); break;
          case 3: visit(std::integral_constant<int, 3>(), i, row); break;
          case 2: visit(std::integral_constant<int, 2>(), i, row); break;
          case 1: visit(std::integral_constant<int, 1>(), i, row); break;
        }
      }
    }
  }
}

// ---------------------------------------------------------------- activations as integers

// 32 activations as integers of at most `levels`, with their scale and sums.
struct SubGroup {
  __m512i q[2];
  float scale, sum;
  int32_t total;
};

SubGroup LoadSubGroup(const float* from, int64_t left, float levels) {
  const __mmask16 m0 = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
  const __mmask16 m1 = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
  const __m512 a = _mm512_maskz_loadu_ps(m0, from), b = _mm512_maskz_loadu_ps(m1, from + 16);
  const __m512 size = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
  // x - x is 0 unless x is NaN or infinite; those come out as NaN, through the scale.
  const __m512 zero = _mm512_add_ps(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b));
  const bool finite = _mm512_cmp_ps_mask(zero, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
  SubGroup out;
  out.scale = finite ? _mm512_reduce_max_ps(size) / levels : NAN;
  out.sum = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  const __m512 inverse = _mm512_set1_ps(out.scale > 0 ? 1 / out.scale : 0);
  const __mmask16 keep = finite ? 0xffff : 0;
  out.q[0] = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(a, inverse));
  out.q[1] = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(b, inverse));
  out.total = _mm512_reduce_add_epi32(_mm512_add_epi32(out.q[0], out.q[1]));
  return out;
}

__m256i Narrow(__m512i a, __m512i b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(a)), _mm512_cvtsepi32_epi8(b), 1);
}

// q = 128 high + low, both signed bytes.
void SplitBytes(__m512i a, __m512i b, __m256i* high, __m256i* low) {
  const __m512i half = _mm512_set1_epi32(64);
  const __m512i ha = _mm512_srai_epi32(_mm512_add_epi32(a, half), 7);
  const __m512i hb = _mm512_srai_epi32(_mm512_add_epi32(b, half), 7);
  *high = Narrow(ha, hb);
  *low = Narrow(_mm512_sub_epi32(a, _mm512_slli_epi32(ha, 7)), _mm512_sub_epi32(b, _mm512_slli_epi32(hb, 7)));
}

// 32 columns as the nibbles of packed codes unpack: the even ones first.
__m256i EvenOdd(__m256i bytes) {
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, split), 0b11011000);
}

// ---------------------------------------------------------------- float weights, a few rows of x

template <Kind kind>
__m512 LoadFloat(const void* codes, int64_t i, __mmask16 mask) {
  if constexpr (kind == Kind::kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(codes) + i);
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(codes) + i);
  if constexpr (kind == Kind::kF16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <Kind kind, int M>
void FloatRow(const Weights& w, const float* x, int64_t row, float* y) {
  const int64_t base = row * w.cols, n = w.inputs;
  __m512 acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= n; k += 32) {
    __m512 w0 = LoadFloat<kind>(w.codes, base + k, 0xffff), w1 = LoadFloat<kind>(w.codes, base + k + 16, 0xffff);
    for (int m = 0; m < M; ++m) {
      acc[m][0] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x + m * n + k), acc[m][0]);
      acc[m][1] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x + m * n + k + 16), acc[m][1]);
    }
  }
  for (; k < n; k += 16) {
    __mmask16 mask = n - k >= 16 ? 0xffff : (1u << (n - k)) - 1;
    __m512 w0 = LoadFloat<kind>(w.codes, base + k, mask);
    for (int m = 0; m < M; ++m)
      acc[m][0] = _mm512_fmadd_ps(w0, _mm512_maskz_loadu_ps(mask, x + m * n + k), acc[m][0]);
  }
  for (int m = 0; m < M; ++m) y[m * w.rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(acc[m][0], acc[m][1]));
}

template <Kind kind>
void FloatRows(const Weights& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
  ForRowsInBlocks(m, begin, end, [&](auto count, int64_t i, int64_t row) {
    FloatRow<kind, decltype(count)::value>(w, x + i * w.inputs, row, y + i * w.rows);
  });
}

// ---------------------------------------------------------------- quantized weights, a few rows of x

// Columns one 64-byte load of codes covers, and how many of the 16 integer sums belong to one sub-group.
template <Kind kind>
constexpr int64_t kBlock = kind == Kind::kInt4 ? 128 : 64;

// One block of columns of one row of x, in the order in which the codes meet it.
template <Kind kind>
struct Block;
template <>
struct alignas(64) Block<Kind::kInt4> {
  int8_t high[2][64], low[2][64];  // [even columns, odd columns]
  float scale[16];                 // of each integer sum
  int32_t offset[16];              // takes back the +8 of the codes
};
template <>
struct alignas(64) Block<Kind::kInt8> {
  int8_t high[1][64], low[1][64];
  float scale[16];
  int32_t offset[16];
};

template <Kind kind>
struct Precise {
  static constexpr int64_t kSubs = kBlock<kind> / kSub;
  static constexpr int kParts = kind == Kind::kInt4 ? 2 : 1;
  static int64_t Blocks(const Weights& w) { return RoundUp(w.cols, kBlock<kind>) / kBlock<kind>; }

  static void Prepare(const Weights& w, const float* x, Block<kind>* out, float* sums) {
    constexpr int64_t lanes = 16 / kSubs;
    for (int64_t b = 0; b < Blocks(w); ++b) {
      Block<kind>& block = out[b];
      for (int64_t s = 0; s < kSubs; ++s) {
        const int64_t start = b * kBlock<kind> + s * kSub;
        const SubGroup x32 = LoadSubGroup(x + start, w.inputs - start, 16256.0f);
        __m256i high, low;
        SplitBytes(x32.q[0], x32.q[1], &high, &low);
        if constexpr (kind == Kind::kInt4) {
          high = EvenOdd(high);
          low = EvenOdd(low);
          for (int part = 0; part < 2; ++part) {
            auto* at = reinterpret_cast<__m128i*>(block.high[part] + s * 16);
            _mm_store_si128(at, part ? _mm256_extracti128_si256(high, 1) : _mm256_castsi256_si128(high));
            at = reinterpret_cast<__m128i*>(block.low[part] + s * 16);
            _mm_store_si128(at, part ? _mm256_extracti128_si256(low, 1) : _mm256_castsi256_si128(low));
          }
        } else {
          _mm256_store_si256(reinterpret_cast<__m256i*>(block.high[0] + s * kSub), high);
          _mm256_store_si256(reinterpret_cast<__m256i*>(block.low[0] + s * kSub), low);
        }
        for (int64_t i = 0; i < lanes; ++i) {
          block.scale[s * lanes + i] = x32.scale;
          block.offset[s * lanes + i] = i ? 0 : -(kind == Kind::kInt4 ? 8 : 128) * x32.total;
        }
        if (start < w.cols) sums[start / kSub] = x32.sum;
      }
    }
  }

  // The scales of a block's sums: lane i has that of its sub-group. `first` is the row's first scale.
  template <bool kWhole>
  static __m512 NarrowScales(const uint16_t* from, int64_t left) {
    __m128i h;
    if constexpr (kWhole && kind == Kind::kInt4)
      h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    else if constexpr (kWhole)
      h = _mm_loadu_si32(from);
    else
      h = _mm_maskz_loadu_epi16((1u << std::min(left, kSubs)) - 1, from);
    const __m512i spread = kind == Kind::kInt4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                               : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_cvtph_ps(h)));
  }

  static __m512 AnyScales(const Weights& w, int64_t first, int64_t b) {
    alignas(64) float lanes[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t column = b * kBlock<kind> + i / (16 / kSubs) * kSub;
      lanes[i] = column < w.cols ? LoadScale(w.scales, first + column / w.group, w.wide_scales) : 0.0f;
    }
    return _mm512_load_ps(lanes);
  }

  // Adds one block's products to M sums.
  template <int M>
  static inline void Step(__m512i raw, __m512 scales, bool lifted, const Block<kind>* x, int64_t stride, int64_t b,
                          __m512* acc) {
    const __m512i nibble = _mm512_set1_epi8(15);
    // Affine 4-bit codes are unsigned as they are; the others become so, and the offsets take it back.
    if (kind == Kind::kInt8 || lifted)
      raw = _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(kind == Kind::kInt4 ? 0x88 : 0x80)));
    __m512i part[2] = {raw, raw};
    if constexpr (kind == Kind::kInt4) {
      part[0] = _mm512_and_si512(raw, nibble);
      part[1] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble);
    }
    for (int m = 0; m < M; ++m) {
      const Block<kind>& xb = x[m * stride + b];
      __m512i low = kind == Kind::kInt8 || lifted ? _mm512_load_si512(xb.offset) : _mm512_setzero_si512();
      __m512i high = _mm512_setzero_si512();
      for (int p = 0; p < kParts; ++p) {
        high = _mm512_dpbusd_epi32(high, part[p], _mm512_load_si512(xb.high[p]));
        low = _mm512_dpbusd_epi32(low, part[p], _mm512_load_si512(xb.low[p]));
      }
      const __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
      acc[m] = _mm512_fmadd_ps(total, _mm512_mul_ps(scales, _mm512_load_ps(xb.scale)), acc[m]);
    }
  }

  template <int M>
  static void Row(const Weights& w, const Block<kind>* x, int64_t stride, const float* sums, int64_t sum_stride,
                  int64_t row, float* y) {
    const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols, per_row = w.cols / w.group;
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    const int64_t whole = bytes / 64, first = row * per_row;
    const bool lifted = !w.mins;
    const auto* narrow = static_cast<const uint16_t*>(w.scales) + first;
    __m512 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
    if (w.group == kSub && !w.wide_scales) {
      for (int64_t b = 0; b < whole; ++b) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + b * 64 + 2048), _MM_HINT_T0);
        Step<M>(_mm512_loadu_si512(codes + b * 64), NarrowScales<true>(narrow + b * kSubs, 0), lifted, x, stride, b, acc);
      }
    } else {
      for (int64_t b = 0; b < whole; ++b)
        Step<M>(_mm512_loadu_si512(codes + b * 64), AnyScales(w, first, b), lifted, x, stride, b, acc);
    }
    if (bytes % 64) {
      const __m512i raw = _mm512_maskz_loadu_epi8((1ull << (bytes % 64)) - 1, codes + whole * 64);
      const bool fast = w.group == kSub && !w.wide_scales;
      const __m512 scales = fast ? NarrowScales<false>(narrow + whole * kSubs, per_row - whole * kSubs)
                                 : AnyScales(w, first, whole);
      Step<M>(raw, scales, lifted, x, stride, whole, acc);
    }
    for (int m = 0; m < M; ++m) {
      float total = _mm512_reduce_add_ps(acc[m]);
      if (w.mins) total += Minimums(w, sums + m * sum_stride, row);
      y[m * w.rows + row] = total;
    }
  }

  static float Minimums(const Weights& w, const float* sums, int64_t row) {
    const int64_t per_row = w.cols / w.group;
    float total = 0;
    for (int64_t s = 0; s < w.cols / kSub; ++s)
      total += LoadScale(w.mins, row * per_row + s * kSub / w.group, w.wide_scales) * sums[s];
    return total;
  }

  static void Rows(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end) {
    const int64_t stride = Blocks(w), sum_stride = w.cols / kSub;
    const auto* x = static_cast<const Block<kind>*>(prepared);
    const auto* sums = reinterpret_cast<const float*>(x + m * stride);
    ForRowsInBlocks(m, begin, end, [&](auto count, int64_t i, int64_t row) {
      Row<decltype(count)::value>(w, x + i * stride, stride, sums + i * sum_stride, sum_stride, row,
                                  y + i * w.rows);
    });
  }
};

int64_t PreciseBytes(const Weights& w, int64_t m) {
  const int64_t sums = w.cols / kSub * static_cast<int64_t>(sizeof(float));
  if (w.kind == Kind::kInt4) return m * (Precise<Kind::kInt4>::Blocks(w) * sizeof(Block<Kind::kInt4>) + sums);
  if (w.kind == Kind::kInt8) return m * (Precise<Kind::kInt8>::Blocks(w) * sizeof(Block<Kind::kInt8>) + sums);
  return 0;
}

template <Kind kind>
void PrepareAll(const Weights& w, const float* x, int64_t m, void* out) {
  const int64_t stride = Precise<kind>::Blocks(w);
  auto* blocks = static_cast<Block<kind>*>(out);
  auto* sums = reinterpret_cast<float*>(blocks + m * stride);
  for (int64_t i = 0; i < m; ++i)
    Precise<kind>::Prepare(w, x + i * w.inputs, blocks + i * stride, sums + i * (w.cols / kSub));
}

void PrecisePrepare(const Weights& w, const float* x, int64_t m, void* out) {
  if (w.kind == Kind::kInt4) PrepareAll<Kind::kInt4>(w, x, m, out);
  if (w.kind == Kind::kInt8) PrepareAll<Kind::kInt8>(w, x, m, out);
}

void PreciseRows(const Weights& w, const float* x, const void* prepared, int64_t m, float* y, int64_t begin,
                 int64_t end) {
  switch (w.kind) {
    case Kind::kF32: return FloatRows<Kind::kF32>(w, x, m, y, begin, end);
    case Kind::kBf16: return FloatRows<Kind::kBf16>(w, x, m, y, begin, end);
    case Kind::kF16: return FloatRows<Kind::kF16>(w, x, m, y, begin, end);
    case Kind::kInt8: return Precise<Kind::kInt8>::Rows(w, prepared, m, y, begin, end);
    case Kind::kInt4: return Precise<Kind::kInt4>::Rows(w, prepared, m, y, begin, end);
  }
}

// ---------------------------------------------------------------- quantized weights, many rows of x

constexpr int64_t kTileRows = 32;  // weight rows in a register tile: two vectors of 16
constexpr int kSteps = kSub / 4;   // VNNI steps of four columns in a sub-group

// 4-bit weights meet 8-bit activations, whose error is far below the weights' own. 8-bit weights are as fine as
// that themselves, so they meet 15 bits: two bytes, as above, for twice the products.
bool Fine(const Weights& w) { return w.kind == Kind::kInt8; }

// Prepared x: bytes [m, cols] in the column order of the packed weights (twice if fine: high, low), then scale,
// offset, sum [m, cols / 32].
struct TiledX {
  const int8_t* q;
  const int8_t* low;
  const float* scale;
  const int32_t* offset;
  const float* sum;
};

TiledX TiledView(const Weights& w, const void* prepared, int64_t m) {
  const int64_t subs = w.cols / kSub;
  const auto* q = static_cast<const int8_t*>(prepared);
  const auto* low = q + m * w.cols;
  const auto* scale = reinterpret_cast<const float*>(Fine(w) ? low + m * w.cols : low);
  const auto* offset = reinterpret_cast<const int32_t*>(scale + m * subs);
  return {q, low, scale, offset, reinterpret_cast<const float*>(offset + m * subs)};
}

int64_t TiledBytes(const Weights& w, int64_t m) {
  return m * ((Fine(w) ? 2 : 1) * w.cols + w.cols / kSub * 12);
}

void TiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  const TiledX view = TiledView(w, out, m);
  const int64_t subs = w.cols / kSub;
  const int32_t lift = w.kind == Kind::kInt4 ? (w.mins ? 0 : 8) : 128;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t s = 0; s < subs; ++s) {
      const float levels = Fine(w) ? 16256.0f : 127.0f;
      const SubGroup x32 = LoadSubGroup(x + i * w.inputs + s * kSub, w.inputs - s * kSub, levels);
      const int64_t at = i * w.cols + s * kSub;
      __m256i bytes, low;
      if (Fine(w)) {
        SplitBytes(x32.q[0], x32.q[1], &bytes, &low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(const_cast<int8_t*>(view.low) + at), low);
      } else {
        bytes = EvenOdd(Narrow(x32.q[0], x32.q[1]));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(const_cast<int8_t*>(view.q) + at), bytes);
      const_cast<float*>(view.scale)[i * subs + s] = x32.scale;
      const_cast<float*>(view.sum)[i * subs + s] = x32.sum;
      const_cast<int32_t*>(view.offset)[i * subs + s] = -lift * x32.total;
    }
  }
}

// A tile of 32 weight rows: codes [sub-group][step][vector][16 rows][4 columns], scales and mins
// [sub-group][32 rows].
struct Tile {
  uint8_t* codes;
  float* scale;
  float* min;
};

Tile TileView(const Weights& w, void* scratch) {
  auto* codes = static_cast<uint8_t*>(scratch);
  auto* scale = reinterpret_cast<float*>(codes + kTileRows * w.cols);
  return {codes, scale, scale + kTileRows * (w.cols / kSub)};
}

int64_t TiledScratchBytes(const Weights& w) { return kTileRows * (w.cols + w.cols / kSub * 8); }

void Pack(const Weights& w, int64_t begin, const Tile& tile) {
  const int64_t subs = w.cols / kSub, per_row = w.cols / w.group;
  const int64_t bytes = w.kind == Kind::kInt4 ? w.cols / 2 : w.cols;
  const auto* codes = static_cast<const uint8_t*>(w.codes);
  for (int v = 0; v < 2; ++v) {
    alignas(64) int64_t row[16];
    for (int i = 0; i < 16; ++i) row[i] = std::min(begin + v * 16 + i, w.rows - 1);  // past the end: repeat
    const __m512i first = _mm512_mullo_epi64(_mm512_sub_epi64(_mm512_load_si512(row), _mm512_set1_epi64(row[0])),
                                             _mm512_set1_epi64(bytes));
    const __m512i second = _mm512_mullo_epi64(
        _mm512_sub_epi64(_mm512_load_si512(row + 8), _mm512_set1_epi64(row[0])), _mm512_set1_epi64(bytes));
    const __m512i at = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(first)),
                                          _mm512_cvtepi64_epi32(second), 1);
    const uint8_t* base = codes + row[0] * bytes;
    for (int64_t s = 0; s < subs; ++s) {
      auto* out = reinterpret_cast<__m512i*>(tile.codes) + s * kSteps * 2 + v;
      if (w.kind == Kind::kInt4) {
        for (int j = 0; j < 4; ++j) {
          __m512i raw = _mm512_i32gather_epi32(at, base + s * 16 + 4 * j, 1);
          if (!w.mins) raw = _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x88)));
          const __m512i nibble = _mm512_set1_epi8(15);
          _mm512_store_si512(out + 2 * j, _mm512_and_si512(raw, nibble));
          _mm512_store_si512(out + 2 * (4 + j), _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
        }
      } else {
        for (int j = 0; j < kSteps; ++j) {
          __m512i raw = _mm512_i32gather_epi32(at, base + s * 32 + 4 * j, 1);
          _mm512_store_si512(out + 2 * j, _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80))));
        }
      }
      for (int i = 0; i < 16; ++i) {
        const int64_t from = row[i] * per_row + s * kSub / w.group;
        tile.scale[s * kTileRows + v * 16 + i] = LoadScale(w.scales, from, w.wide_scales);
        if (w.mins) tile.min[s * kTileRows + v * 16 + i] = LoadScale(w.mins, from, w.wide_scales);
      }
    }
  }
}

inline __m512i Splat4(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

template <int M, bool kAffine, bool kFine>
void Multiply(const Weights& w, const TiledX& x, const Tile& tile, int64_t i, float* y, int64_t begin,
              int64_t end) {
  const int64_t subs = w.cols / kSub;
  __m512 acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  for (int64_t s = 0; s < subs; ++s) {
    __m512i sum[M][2], high[kFine ? M : 1][2];
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_set1_epi32(x.offset[(i + m) * subs + s]);
    if constexpr (kFine)
      for (int m = 0; m < M; ++m) high[m][0] = high[m][1] = _mm512_setzero_si512();
    const auto* codes = reinterpret_cast<const __m512i*>(tile.codes) + s * kSteps * 2;
    for (int j = 0; j < kSteps; ++j) {
      const __m512i w0 = _mm512_load_si512(codes + 2 * j), w1 = _mm512_load_si512(codes + 2 * j + 1);
      for (int m = 0; m < M; ++m) {
        const int64_t at = (i + m) * w.cols + s * kSub + 4 * j;
        const __m512i xb = Splat4(x.q + at);
        if constexpr (kFine) {
          const __m512i xl = Splat4(x.low + at);
          high[m][0] = _mm512_dpbusd_epi32(high[m][0], w0, xb);
          high[m][1] = _mm512_dpbusd_epi32(high[m][1], w1, xb);
          sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, xl);
          sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, xl);
        } else {
          sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, xb);
          sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, xb);
        }
      }
    }
    const float* scales = tile.scale + s * kTileRows;
    const __m512 scale[2] = {_mm512_load_ps(scales), _mm512_load_ps(scales + 16)};
    for (int m = 0; m < M; ++m) {
      const __m512 xs = _mm512_set1_ps(x.scale[(i + m) * subs + s]);
      const __m512 total = _mm512_set1_ps(x.sum[(i + m) * subs + s]);
      for (int v = 0; v < 2; ++v) {
        if constexpr (kFine) sum[m][v] = _mm512_add_epi32(sum[m][v], _mm512_slli_epi32(high[m][v], 7));
        acc[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v]), _mm512_mul_ps(scale[v], xs), acc[m][v]);
        if constexpr (kAffine)
          acc[m][v] = _mm512_fmadd_ps(_mm512_load_ps(tile.min + s * kTileRows + 16 * v), total, acc[m][v]);
      }
    }
  }
  for (int v = 0; v < 2; ++v) {
    const int64_t left = end - begin - 16 * v;
    if (left <= 0) break;
    const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
    for (int m = 0; m < M; ++m) _mm512_mask_storeu_ps(y + (i + m) * w.rows + begin + 16 * v, mask, acc[m][v]);
  }
}

template <bool kAffine, bool kFine>
void MultiplyAll(const Weights& w, const TiledX& x, const Tile& tile, int64_t m, float* y, int64_t begin,
                 int64_t end) {
  constexpr int kM = kFine ? 4 : 6;  // 24 accumulators of the 32 registers
  for (int64_t i = 0; i < m; i += kM) {
    switch (std::min<int64_t>(kM, m - i)) {
      case 6: Multiply<6, kAffine, false>(w, x, tile, i, y, begin, end); break;
      case 5: Multiply<5, kAffine, false>(w, x, tile, i, y, begin, end); break;
      case 4: Multiply<4, kAffine, kFine>(w, x, tile, i, y, begin, end); break;
      case 3: Multiply<3, kAffine, kFine>(w, x, tile, i, y, begin, end); break;
      case 2: Multiply<2, kAffine, kFine>(w, x, tile, i, y, begin, end); break;
      case 1: Multiply<1, kAffine, kFine>(w, x, tile, i, y, begin, end); break;
    }
  }
}

void Tiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const TiledX x = TiledView(w, prepared, m);
  const Tile tile = TileView(w, scratch);
  for (int64_t row = begin; row < end; row += kTileRows) {
    Pack(w, row, tile);
    const int64_t stop = std::min(row + kTileRows, end);
    const auto multiply = Fine(w) ? (w.mins ? MultiplyAll<true, true> : MultiplyAll<false, true>)
                                  : (w.mins ? MultiplyAll<true, false> : MultiplyAll<false, false>);
    multiply(w, x, tile, m, y, row, stop);
  }
}

}  // namespace

const Kernels& Avx512Kernels() {
  static const Kernels kernels = {"avx512-vnni", PreciseBytes, PrecisePrepare, PreciseRows,
                                  TiledBytes,    TiledPrepare, Tiled,          TiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
#endif
