// x @ w.T for quantized and float weights on AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// Weights are unsigned bytes to VNNI (code + 8 or + 128); the offset's share is taken back as one number per 32
// columns. Few rows of x: reading the weights is all that matters, and they are read once, in order. 4-bit weights
// meet activations of 8 bits, whose error is far below the weights' own; 8-bit weights meet 15 bits, split into two
// signed bytes, q = 128 h + l. Many rows of x: a register tile of 32 weight rows, and 8 bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_blocks.h"
#include "cpu_kernels.h"

namespace jaxchat {
namespace {

constexpr int64_t kSub = 32;  // activations are scaled per 32 columns, whatever the weights' group

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

float LoadScale(const void* p, int64_t i, bool wide) {
  return wide ? static_cast<const float*>(p)[i]
              : _cvtsh_ss(static_cast<const uint16_t*>(p)[i]);
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
  ForRowsInBlocks<4>(m, begin, end, 1, 1, [&](auto count, int64_t i, int64_t row, int64_t, int64_t) {
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
  int8_t q[2][64];     // [even columns, odd columns]
  float scale[16];     // of each integer sum
  int32_t offset[16];  // takes back the +8 of the codes
};
template <>
struct alignas(64) Block<Kind::kInt8> {
  int8_t q[2][64];  // [high, low]
  float scale[16];
  int32_t offset[16];
};

template <Kind kind>
struct Few {
  static constexpr int64_t kSubs = kBlock<kind> / kSub;
  static int64_t Blocks(const Weights& w) { return RoundUp(w.cols, kBlock<kind>) / kBlock<kind>; }

  static void Prepare(const Weights& w, const float* x, Block<kind>* out, float* sums) {
    constexpr int64_t lanes = 16 / kSubs;
    for (int64_t b = 0; b < Blocks(w); ++b) {
      Block<kind>& block = out[b];
      for (int64_t s = 0; s < kSubs; ++s) {
        const int64_t start = b * kBlock<kind> + s * kSub;
        const SubGroup x32 = LoadSubGroup(x + start, w.inputs - start, kind == Kind::kInt4 ? 127.0f : 16256.0f);
        if constexpr (kind == Kind::kInt4) {
          const __m256i bytes = EvenOdd(Narrow(x32.q[0], x32.q[1]));
          _mm_store_si128(reinterpret_cast<__m128i*>(block.q[0] + s * 16), _mm256_castsi256_si128(bytes));
          _mm_store_si128(reinterpret_cast<__m128i*>(block.q[1] + s * 16), _mm256_extracti128_si256(bytes, 1));
        } else {
          __m256i high, low;
          SplitBytes(x32.q[0], x32.q[1], &high, &low);
          _mm256_store_si256(reinterpret_cast<__m256i*>(block.q[0] + s * kSub), high);
          _mm256_store_si256(reinterpret_cast<__m256i*>(block.q[1] + s * kSub), low);
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
    const __m512i even = _mm512_and_si512(raw, nibble);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble);
    for (int m = 0; m < M; ++m) {
      const Block<kind>& xb = x[m * stride + b];
      const __m512i q0 = _mm512_load_si512(xb.q[0]), q1 = _mm512_load_si512(xb.q[1]);
      __m512i sum = kind == Kind::kInt8 || lifted ? _mm512_load_si512(xb.offset) : _mm512_setzero_si512();
      if constexpr (kind == Kind::kInt4) {
        sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, q0), odd, q1);
      } else {
        const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), raw, q0);
        sum = _mm512_add_epi32(_mm512_slli_epi32(high, 7), _mm512_dpbusd_epi32(sum, raw, q1));
      }
      const __m512 scale = _mm512_mul_ps(scales, _mm512_load_ps(xb.scale));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[m]);
    }
  }

  template <int M>
  static void Row(const Weights& w, const Block<kind>* x, int64_t stride, const float* sums, int64_t sum_stride,
                  int64_t row, int64_t from, int64_t to, float* y) {
    const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols, per_row = w.cols / w.group;
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    const int64_t whole = std::min(bytes / 64, to), first = row * per_row;
    // The same columns of a row some 4 kB ahead: the next to be read, also where the columns are cut into parts.
    const int64_t ahead = std::max<int64_t>(2, 4096 / bytes) * bytes;
    const bool lifted = !w.mins;
    const auto* narrow = static_cast<const uint16_t*>(w.scales) + first;
    __m512 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
    if (w.group == kSub && !w.wide_scales) {
      for (int64_t b = from; b < whole; ++b) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + b * 64 + ahead), _MM_HINT_T0);
        Step<M>(_mm512_loadu_si512(codes + b * 64), NarrowScales<true>(narrow + b * kSubs, 0), lifted, x, stride, b, acc);
      }
    } else {
      for (int64_t b = from; b < whole; ++b)
        Step<M>(_mm512_loadu_si512(codes + b * 64), AnyScales(w, first, b), lifted, x, stride, b, acc);
    }
    if (whole < to) {
      const __m512i raw = _mm512_maskz_loadu_epi8((1ull << (bytes % 64)) - 1, codes + whole * 64);
      const bool fast = w.group == kSub && !w.wide_scales;
      const __m512 scales = fast ? NarrowScales<false>(narrow + whole * kSubs, per_row - whole * kSubs)
                                 : AnyScales(w, first, whole);
      Step<M>(raw, scales, lifted, x, stride, whole, acc);
    }
    for (int m = 0; m < M; ++m) {
      float total = _mm512_reduce_add_ps(acc[m]);
      if (from > 0)
        total += y[m * w.rows + row];
      else if (w.mins)
        total += Minimums(w, sums + m * sum_stride, row);
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
    constexpr int kMost = kind == Kind::kInt4 ? 8 : 4;  // what the registers hold
    const auto visit = [&](auto count, int64_t i, int64_t row, int64_t from, int64_t to) {
      Row<decltype(count)::value>(w, x + i * stride, stride, sums + i * sum_stride, sum_stride, row, from, to,
                                  y + i * w.rows);
    };
    ForRowsInBlocks<kMost>(m, begin, end, stride, sizeof(Block<kind>), visit);
  }
};

int64_t FewBytes(const Weights& w, int64_t m) {
  const int64_t sums = w.cols / kSub * static_cast<int64_t>(sizeof(float));
  if (w.kind == Kind::kInt4) return m * (Few<Kind::kInt4>::Blocks(w) * sizeof(Block<Kind::kInt4>) + sums);
  if (w.kind == Kind::kInt8) return m * (Few<Kind::kInt8>::Blocks(w) * sizeof(Block<Kind::kInt8>) + sums);
  return 0;
}

template <Kind kind>
void PrepareAll(const Weights& w, const float* x, int64_t m, void* out) {
  const int64_t stride = Few<kind>::Blocks(w);
  auto* blocks = static_cast<Block<kind>*>(out);
  auto* sums = reinterpret_cast<float*>(blocks + m * stride);
  for (int64_t i = 0; i < m; ++i)
    Few<kind>::Prepare(w, x + i * w.inputs, blocks + i * stride, sums + i * (w.cols / kSub));
}

void FewPrepare(const Weights& w, const float* x, int64_t m, void* out) {
  if (w.kind == Kind::kInt4) PrepareAll<Kind::kInt4>(w, x, m, out);
  if (w.kind == Kind::kInt8) PrepareAll<Kind::kInt8>(w, x, m, out);
}

void FewRows(const Weights& w, const float* x, const void* prepared, int64_t m, float* y, int64_t begin,
                 int64_t end) {
  switch (w.kind) {
    case Kind::kF32: return FloatRows<Kind::kF32>(w, x, m, y, begin, end);
    case Kind::kBf16: return FloatRows<Kind::kBf16>(w, x, m, y, begin, end);
    case Kind::kF16: return FloatRows<Kind::kF16>(w, x, m, y, begin, end);
    case Kind::kInt8: return Few<Kind::kInt8>::Rows(w, prepared, m, y, begin, end);
    case Kind::kInt4: return Few<Kind::kInt4>::Rows(w, prepared, m, y, begin, end);
  }
}

// ---------------------------------------------------------------- quantized weights, many rows of x

constexpr int64_t kTileRows = 32;  // weight rows in a register tile: two vectors of 16
constexpr int kSteps = kSub / 4;   // VNNI steps of four columns in a sub-group

// Prepared x: bytes [m, cols] in the column order of the packed weights, then scale, offset, sum [m, cols / 32].
struct TiledX {
  const int8_t* q;
  const float* scale;
  const int32_t* offset;
  const float* sum;
};

TiledX TiledView(const Weights& w, const void* prepared, int64_t m) {
  const int64_t subs = w.cols / kSub;
  const auto* q = static_cast<const int8_t*>(prepared);
  const auto* scale = reinterpret_cast<const float*>(q + m * w.cols);
  const auto* offset = reinterpret_cast<const int32_t*>(scale + m * subs);
  return {q, scale, offset, reinterpret_cast<const float*>(offset + m * subs)};
}

int64_t TiledBytes(const Weights& w, int64_t m) {
  return m * (w.cols + w.cols / kSub * 12);
}

void TiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  const TiledX view = TiledView(w, out, m);
  const int64_t subs = w.cols / kSub;
  const int32_t lift = w.kind == Kind::kInt4 ? (w.mins ? 0 : 8) : 128;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t s = 0; s < subs; ++s) {
      const SubGroup x32 = LoadSubGroup(x + i * w.inputs + s * kSub, w.inputs - s * kSub, 127.0f);
      __m256i bytes = Narrow(x32.q[0], x32.q[1]);
      if (w.kind == Kind::kInt4) bytes = EvenOdd(bytes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(const_cast<int8_t*>(view.q) + i * w.cols + s * kSub), bytes);
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

template <int M, bool kAffine>
void Multiply(const Weights& w, const TiledX& x, const Tile& tile, int64_t i, float* y, int64_t begin,
              int64_t end) {
  const int64_t subs = w.cols / kSub;
  __m512 acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  for (int64_t s = 0; s < subs; ++s) {
    __m512i sum[M][2];
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_set1_epi32(x.offset[(i + m) * subs + s]);
    const auto* codes = reinterpret_cast<const __m512i*>(tile.codes) + s * kSteps * 2;
    for (int j = 0; j < kSteps; ++j) {
      const __m512i w0 = _mm512_load_si512(codes + 2 * j), w1 = _mm512_load_si512(codes + 2 * j + 1);
      for (int m = 0; m < M; ++m) {
        const int64_t at = (i + m) * w.cols + s * kSub + 4 * j;
        const __m512i xb = Splat4(x.q + at);
        sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, xb);
        sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, xb);
      }
    }
    const float* scales = tile.scale + s * kTileRows;
    const __m512 scale[2] = {_mm512_load_ps(scales), _mm512_load_ps(scales + 16)};
    for (int m = 0; m < M; ++m) {
      const __m512 xs = _mm512_set1_ps(x.scale[(i + m) * subs + s]);
      const __m512 total = _mm512_set1_ps(x.sum[(i + m) * subs + s]);
      for (int v = 0; v < 2; ++v) {
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

template <bool kAffine>
void MultiplyAll(const Weights& w, const TiledX& x, const Tile& tile, int64_t m, float* y, int64_t begin,
                 int64_t end) {
  constexpr int kM = 6;  // 24 accumulators of the 32 registers
  for (int64_t i = 0; i < m; i += kM) {
    switch (std::min<int64_t>(kM, m - i)) {
      case 6: Multiply<6, kAffine>(w, x, tile, i, y, begin, end); break;
      case 5: Multiply<5, kAffine>(w, x, tile, i, y, begin, end); break;
      case 4: Multiply<4, kAffine>(w, x, tile, i, y, begin, end); break;
      case 3: Multiply<3, kAffine>(w, x, tile, i, y, begin, end); break;
      case 2: Multiply<2, kAffine>(w, x, tile, i, y, begin, end); break;
      case 1: Multiply<1, kAffine>(w, x, tile, i, y, begin, end); break;
    }
  }
}

void Tiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  const TiledX x = TiledView(w, prepared, m);
  const Tile tile = TileView(w, scratch);
  for (int64_t row = begin; row < end; row += kTileRows) {
    Pack(w, row, tile);
    const int64_t stop = std::min(row + kTileRows, end);
    const auto multiply = w.mins ? MultiplyAll<true> : MultiplyAll<false>;
    multiply(w, x, tile, m, y, row, stop);
  }
}

// ---------------------------------------------------------------- bfloat16 weights, many rows of x

// The processor multiplies pairs of bfloat16 into float32 sums: activations are rounded to bfloat16, as bfloat16
// inference does everywhere. `cols` is even.
#define JAXCHAT_BF16 __attribute__((target("avx512bf16")))

JAXCHAT_BF16 void Bf16Prepare(const Weights& w, const float* x, int64_t begin, int64_t end, void* out) {
  for (int64_t i = begin; i < end; ++i) {
    auto* to = static_cast<uint16_t*>(out) + i * w.cols;
    for (int64_t k = 0; k < w.cols; k += 16) {
      const __mmask16 mask = w.cols - k >= 16 ? 0xffff : (1u << (w.cols - k)) - 1;
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i * w.inputs + k));
      _mm256_mask_storeu_epi16(to + k, mask, (__m256i)rounded);
    }
  }
}

// A tile: [pair of columns][vector][16 rows][2 columns].
void Bf16Pack(const Weights& w, int64_t begin, void* tile) {
  const auto* codes = static_cast<const char*>(w.codes);
  for (int v = 0; v < 2; ++v) {
    alignas(64) int32_t at[16];
    const int64_t first = std::min(begin + v * 16, w.rows - 1);
    for (int64_t i = 0; i < 16; ++i)
      at[i] = static_cast<int32_t>((std::min(first + i, w.rows - 1) - first) * w.cols * 2);
    const __m512i rows = _mm512_load_si512(at);
    auto* to = static_cast<__m512i*>(tile) + v;
    for (int64_t j = 0; j < w.cols / 2; ++j)
      _mm512_store_si512(to + 2 * j, _mm512_i32gather_epi32(rows, codes + first * w.cols * 2 + 4 * j, 1));
  }
}

template <int M>
JAXCHAT_BF16 void Bf16Multiply(const Weights& w, const int8_t* x, const __m512i* tile, int64_t i, float* y,
                               int64_t begin, int64_t end) {
  __m512 acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < w.cols / 2; ++j) {
    const auto w0 = (__m512bh)_mm512_load_si512(tile + 2 * j), w1 = (__m512bh)_mm512_load_si512(tile + 2 * j + 1);
    for (int m = 0; m < M; ++m) {
      const auto pair = (__m512bh)Splat4(x + ((i + m) * w.cols + 2 * j) * 2);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, pair);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, pair);
    }
  }
  for (int v = 0; v < 2; ++v) {
    const int64_t left = end - begin - 16 * v;
    if (left <= 0) break;
    const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
    for (int m = 0; m < M; ++m) _mm512_mask_storeu_ps(y + (i + m) * w.rows + begin + 16 * v, mask, acc[m][v]);
  }
}

void Bf16Tiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* tile) {
  const auto* x = static_cast<const int8_t*>(prepared);
  const auto* packed = static_cast<const __m512i*>(tile);
  for (int64_t row = begin; row < end; row += kTileRows) {
    Bf16Pack(w, row, tile);
    const int64_t stop = std::min(row + kTileRows, end);
    int64_t i = 0;
    for (; i + 8 <= m; i += 8) Bf16Multiply<8>(w, x, packed, i, y, row, stop);
    for (; i < m; ++i) Bf16Multiply<1>(w, x, packed, i, y, row, stop);
  }
}

// ---------------------------------------------------------------- many rows of x, any weights

int64_t AnyTiledBytes(const Weights& w, int64_t m) {
  return w.kind == Kind::kBf16 ? m * w.cols * 2 : TiledBytes(w, m);
}

void AnyTiledPrepare(const Weights& w, const float* x, int64_t m, int64_t begin, int64_t end, void* out) {
  if (w.kind == Kind::kBf16) return Bf16Prepare(w, x, begin, end, out);
  TiledPrepare(w, x, m, begin, end, out);
}

int64_t AnyTiledScratchBytes(const Weights& w) {
  return w.kind == Kind::kBf16 ? kTileRows * w.cols * 2 : TiledScratchBytes(w);
}

void AnyTiled(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end, void* scratch) {
  if (w.kind == Kind::kBf16) return Bf16Tiled(w, prepared, m, y, begin, end, scratch);
  Tiled(w, prepared, m, y, begin, end, scratch);
}

}  // namespace

const Kernels& Avx512Kernels() {
  static const Kernels kernels = {"avx512-vnni", FewBytes,        FewPrepare, FewRows,
                                  AnyTiledBytes, AnyTiledPrepare, AnyTiled,   AnyTiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
#endif
