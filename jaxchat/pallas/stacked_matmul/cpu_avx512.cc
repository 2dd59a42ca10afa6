// x @ w.T for quantized and float weights on AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// Weights are unsigned bytes to VNNI (code + 8 or + 128); the offset's share is taken back as one number per 32
// columns. Few rows of x: reading the weights is all that matters, and they are read once, in order. 4-bit weights
// meet activations of 8 bits, whose error is far below the weights' own; 8-bit weights meet 15 bits, split into two
// signed bytes, q = 128 h + l. Many rows of x: a register tile of 32 weight rows, and 8 bits.
#include "cpu_common.h"

namespace jaxchat {
namespace {

// ---------------------------------------------------------------- the order of columns

// 32 columns as signed bytes.
__m256i Narrow(const Ints* q) {
  const __m128i low = _mm512_cvtepi32_epi8(Bits<__m512i>(q[0])), high = _mm512_cvtepi32_epi8(Bits<__m512i>(q[1]));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 32 columns as the nibbles of packed codes unpack: the even ones first.
__m256i EvenOdd(__m256i bytes) {
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, split), 0b11011000);
}

// ---------------------------------------------------------------- quantized weights, a few rows of x

// A block is four vectors of codes, 16 units of 16 bytes: a sub-group of 4-bit codes or half of one of 8-bit codes.
// Each unit has a lane of 32 bits to itself, so that a sum over all four vectors keeps the sub-groups apart.
constexpr int64_t kBytesInBlock = 256;
constexpr int64_t kUnits = 16;

constexpr int64_t Lane(int64_t unit) { return unit % 4 * 4 + unit / 4; }  // and the unit of a lane

// One block of columns of one row of x, in the order in which the codes meet it.
template <Kind kind>
struct alignas(64) Block {
  static constexpr int64_t kColumns = kind == Kind::kInt4 ? 512 : 256;
  static constexpr int64_t kSubs = kColumns / kSub;
  static constexpr int64_t kSpread = kUnits / kSubs;  // lanes of a sub-group
  int32_t q[4][2][kUnits];  // a lane's next four bytes of codes meet: even and odd columns, or low and high bytes
  float scale[kUnits];
  float sum[kUnits];       // of the values, for affine weights; in one lane of a sub-group, like `offset`
  int32_t offset[kUnits];  // takes back the lift of the codes
};

// Four vectors of codes: of each unit the first four bytes to the first vector, and so on.
inline void Deal(__m512i* raw) {
  const __m512i a = _mm512_unpacklo_epi32(raw[0], raw[1]), b = _mm512_unpackhi_epi32(raw[0], raw[1]);
  const __m512i c = _mm512_unpacklo_epi32(raw[2], raw[3]), d = _mm512_unpackhi_epi32(raw[2], raw[3]);
  raw[0] = _mm512_unpacklo_epi64(a, c);
  raw[1] = _mm512_unpackhi_epi64(a, c);
  raw[2] = _mm512_unpacklo_epi64(b, d);
  raw[3] = _mm512_unpackhi_epi64(b, d);
}

// Adds the products of a block to M sums.
template <Kind kind, int M, bool kAffine>
inline void Step(__m512i* raw, __m512 scales, __m512 mins, const Block<kind>* x, int64_t stride, __m512* acc) {
  constexpr bool kNibbles = kind == Kind::kInt4;
  const __m512i nibble = _mm512_set1_epi8(15), lift = _mm512_set1_epi8(static_cast<char>(kNibbles ? 0x88 : 0x80));
  __m512i codes[4][2];
  Deal(raw);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    // Affine 4-bit codes are unsigned as they are.
    const __m512i lifted = kNibbles && kAffine ? raw[v] : _mm512_xor_si512(raw[v], lift);
    codes[v][0] = kNibbles ? _mm512_and_si512(lifted, nibble) : lifted;
    codes[v][1] = kNibbles ? _mm512_and_si512(_mm512_srli_epi16(lifted, 4), nibble) : lifted;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Block<kind>& block = x[m * stride];
    __m512i sum[2] = {_mm512_load_si512(block.offset), _mm512_setzero_si512()};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], codes[v][i], _mm512_load_si512(block.q[v][i]));
    const __m512i total = _mm512_add_epi32(sum[0], kNibbles ? sum[1] : _mm512_slli_epi32(sum[1], 7));
    acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(scales, _mm512_load_ps(block.scale)), acc[m]);
    if constexpr (kAffine) acc[m] = _mm512_fmadd_ps(mins, _mm512_load_ps(block.sum), acc[m]);
  }
}

template <Kind kind>
struct Few {
  using Block = jaxchat::Block<kind>;
  static constexpr int kMost = 8;

  static int64_t Blocks(const Weights& w) { return (w.cols + Block::kColumns - 1) / Block::kColumns; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    for (int64_t b = 0; b < Blocks(w); ++b)
      for (int64_t s = 0; s < Block::kSubs; ++s) PrepareSub(w, x, b * Block::kColumns + s * kSub, s, out + b);
  }

  template <int M, bool kAffine>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    const int64_t bytes = kind == Kind::kInt4 ? w.cols / 2 : w.cols, stride = Blocks(w);
    const auto* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    const int64_t whole = std::min(bytes / kBytesInBlock, to);
    const __m512 none = _mm512_setzero_ps();
    __m512i raw[4];
    __m512 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = none;
    const auto load = [&](int64_t b) {
      for (int v = 0; v < 4; ++v) raw[v] = _mm512_loadu_si512(codes + b * kBytesInBlock + v * 64);
    };
    int64_t b = from;
    if (scales.plain())
      for (; b < whole; ++b) {
        Prefetch<kBytesInBlock>(codes + b * kBytesInBlock);
        load(b);
        Step<kind, M, kAffine>(raw, Plain(scales, row, b), kAffine ? Plain(mins, row, b) : none, x + b, stride, acc);
      }
    for (; b < to; ++b) {
      const int64_t left = bytes - b * kBytesInBlock;
      if (left >= kBytesInBlock)
        load(b);
      else
        for (int v = 0; v < 4; ++v)
          raw[v] = _mm512_maskz_loadu_epi8(Mask(left - v * 64), codes + b * kBytesInBlock + v * 64);
      const int64_t subs = std::min(Block::kSubs, w.cols / kSub - b * Block::kSubs);
      const __m512 min = kAffine ? Any(mins, row, b, subs) : none;
      Step<kind, M, kAffine>(raw, Any(scales, row, b, subs), min, x + b, stride, acc);
    }
    for (int m = 0; m < M; ++m) Put(_mm512_reduce_add_ps(acc[m]), from, y + m * w.rows + row);
  }

 private:
  static __mmask64 Mask(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0; }

  static void PrepareSub(const Weights& w, const float* x, int64_t start, int64_t s, Block* block) {
    const Quantized sub = Quantize(x + start, w.inputs - start, kind == Kind::kInt4 ? 127 : 16256);
    alignas(32) int32_t fours[2][8];
    if constexpr (kind == Kind::kInt4) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours), EvenOdd(Narrow(sub.q)));
    } else {  // q = 128 high + low
      const Ints high[2] = {(sub.q[0] + 64) >> 7, (sub.q[1] + 64) >> 7};
      const Ints low[2] = {sub.q[0] - (high[0] << 7), sub.q[1] - (high[1] << 7)};
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours[0]), Narrow(low));
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours[1]), Narrow(high));
    }
    for (int64_t i = 0; i < Block::kSpread; ++i) {
      const int64_t lane = Lane(s * Block::kSpread + i);
      for (int v = 0; v < 4; ++v)
        for (int part = 0; part < 2; ++part)
          block->q[v][part][lane] = kind == Kind::kInt4 ? fours[0][4 * part + v] : fours[part][4 * i + v];
      block->scale[lane] = sub.scale;
      block->sum[lane] = i ? 0 : sub.sum;
      block->offset[lane] = i ? 0 : kind == Kind::kInt8 ? -128 * sub.total : w.mins ? 0 : -8 * sub.total;
    }
  }

  // float16 of a block's sub-groups, each to its lanes.
  static __m512 Spread(__m256i halves) {
    alignas(64) static constexpr auto kFrom = [] {
      struct { int32_t lane[kUnits]; } from{};
      for (int64_t i = 0; i < kUnits; ++i) from.lane[i] = Lane(i) / Block::kSpread;
      return from;
    }();
    return _mm512_permutexvar_ps(_mm512_load_si512(kFrom.lane), _mm512_cvtph_ps(halves));
  }

  static __m512 Plain(const Groups& groups, int64_t row, int64_t b) {
    const auto* from = reinterpret_cast<const __m256i*>(groups.Plain(row, b * Block::kSubs));
    if constexpr (kind == Kind::kInt4) return Spread(_mm256_loadu_si256(from));
    return Spread(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }

  // The first `subs` of a block.
  static __m512 Any(const Groups& groups, int64_t row, int64_t b, int64_t subs) {
    if (groups.plain()) return Spread(_mm256_maskz_loadu_epi16((1u << subs) - 1, groups.Plain(row, b * Block::kSubs)));
    Floats lanes{};
    for (int64_t s = 0; s < subs; ++s)
      for (int64_t i = 0; i < Block::kSpread; ++i)
        lanes[Lane(s * Block::kSpread + i)] = groups.At(row, b * Block::kSubs + s);
    return Bits<__m512>(lanes);
  }
};

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
      const Quantized x32 = Quantize(x + i * w.inputs + s * kSub, w.inputs - s * kSub, 127);
      __m256i bytes = Narrow(x32.q);
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
  static const Kernels kernels = {"avx512-vnni", FewRows<Few>::Bytes, FewRows<Few>::Prepare, FewRows<Few>::Rows,
                                  AnyTiledBytes, AnyTiledPrepare,     AnyTiled,              AnyTiledScratchBytes};
  return kernels;
}

}  // namespace jaxchat
