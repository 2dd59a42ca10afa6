// x @ w.T for quantized and float weights on AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// Weights are unsigned bytes to VNNI (code + 8 or + 128); the offset's share is taken back as one number per 32
// columns. Few rows of x: reading the weights is all that matters, and they are read once, in order. 4-bit weights
// meet activations of 8 bits, whose error is far below the weights' own; 8-bit weights meet 15 bits, split into two
// signed bytes, q = 128 h + l. Many rows of x: a register tile of 32 weight rows, and 8 bits.
#define JAXCHAT_ISA JAXCHAT_AVX512
#include "../cpu_target.h"

#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::avx512 {
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

// ---------------------------------------------------------------- a few rows of x

// A block is four vectors of codes, 16 units of 16 bytes: a sub-group of 4-bit codes or half of one of 8-bit codes.
// Each unit has a lane of 32 bits to itself, so that a sum over all four vectors keeps the sub-groups apart.
constexpr int64_t kBytesInBlock = 256;
constexpr int64_t kUnits = 16;

constexpr int64_t Lane(int64_t unit) { return unit % 4 * 4 + unit / 4; }  // and the unit of a lane

// One block of columns of one row of x, in the order in which the codes meet it.
template <int kBits>
struct alignas(64) Block {
  static constexpr int64_t kColumns = kBytesInBlock * 8 / kBits;
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
template <int kBits, int M, bool kAffine>
inline void Step(__m512i* raw, __m512 scales, __m512 mins, const Block<kBits>* x, int64_t stride, __m512* acc) {
  constexpr bool kNibbles = kBits == 4;
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
    const Block<kBits>& block = x[m * stride];
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

template <int kBits, bool kAffine>
struct Few {
  using Block = avx512::Block<kBits>;
  static constexpr int kMost = 8;

  static int64_t Blocks(const Weights& w) { return (w.cols + Block::kColumns - 1) / Block::kColumns; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    for (int64_t b = 0; b < Blocks(w); ++b)
      for (int64_t s = 0; s < Block::kSubs; ++s) PrepareSub(w, x, b * Block::kColumns + s * kSub, s, out + b);
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    const int64_t bytes = CodeBytes<kBits>(w), stride = Blocks(w);
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
        Step<kBits, M, kAffine>(raw, Plain(scales, row, b), kAffine ? Plain(mins, row, b) : none, x + b, stride, acc);
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
      Step<kBits, M, kAffine>(raw, Any(scales, row, b, subs), min, x + b, stride, acc);
    }
    for (int m = 0; m < M; ++m) Put(_mm512_reduce_add_ps(acc[m]), from, y + m * w.rows + row);
  }

 private:
  static __mmask64 Mask(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0; }

  static void PrepareSub(const Weights& w, const float* x, int64_t start, int64_t s, Block* block) {
    const Quantized sub = Quantize(x + start, w.inputs - start, kBits == 4 ? 127 : 16256);
    alignas(32) int32_t fours[2][8];
    if constexpr (kBits == 4) {
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
          block->q[v][part][lane] = kBits == 4 ? fours[0][4 * part + v] : fours[part][4 * i + v];
      block->scale[lane] = sub.scale;
      block->sum[lane] = i ? 0 : sub.sum;
      block->offset[lane] = i ? 0 : kBits == 8 ? -128 * sub.total : kAffine ? 0 : -8 * sub.total;
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
    if constexpr (kBits == 4) return Spread(_mm256_loadu_si256(from));
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

// ---------------------------------------------------------------- many rows of x

inline __m512i Splat4(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// [step of four columns][vector][16 rows][4 columns] of bytes, in the column order of the packed codes.
template <int kBits, bool kAffine_>
struct Tile {
  using Code = uint8_t;
  using Input = int8_t;
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kRows = 32, kPart = int64_t{1} << 32, kPanel = 1;
  static constexpr int kMost = 6;  // 24 accumulators of the 32 registers
  static constexpr int kLevels = 127, kInputs = kSub, kCodes = kSub;
  static constexpr int kSteps = kSub / 4;                                  // in a sub-group
  static constexpr int kLift = kBits == 8 ? 128 : kAffine ? 0 : 8;  // affine 4-bit codes are unsigned as they are

  static int32_t Prepare(const Quantized& x, int64_t, int8_t* out) {
    const __m256i bytes = Narrow(x.q);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), kBits == 4 ? EvenOdd(bytes) : bytes);
    return -kLift * x.total;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, uint8_t* out) {
    const int64_t bytes = CodeBytes<kBits>(w);
    for (int v = 0; v < 2; ++v, rows += 16) {
      alignas(64) int32_t offsets[16];  // within the tile: less than 2 GB
      for (int i = 0; i < 16; ++i) offsets[i] = static_cast<int32_t>((rows[i] - rows[0]) * bytes);
      const __m512i at = _mm512_load_si512(offsets);
      const auto* codes = static_cast<const uint8_t*>(w.codes) + rows[0] * bytes + from * kBits / 8;
      auto* steps = reinterpret_cast<__m512i*>(out) + v;
      for (int64_t s = from; s < to; s += kSub, codes += kSub * kBits / 8, steps += 2 * kSteps) PackSub(codes, at, steps);
    }
  }

  template <int M>
  static void Products(const uint8_t* tile, const int8_t* x, int64_t stride, const int32_t* starts,
                       Ints (&sums)[M][2]) {
    const auto* codes = reinterpret_cast<const __m512i*>(tile);
    __m512i sum[M][2];
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_set1_epi32(starts[m]);
    for (int j = 0; j < kSteps; ++j) {
      const __m512i w0 = _mm512_load_si512(codes + 2 * j), w1 = _mm512_load_si512(codes + 2 * j + 1);
      for (int m = 0; m < M; ++m) {
        const __m512i inputs = Splat4(x + m * stride + 4 * j);
        sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, inputs);
        sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, inputs);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 2; ++v) sums[m][v] = Bits<Ints>(sum[m][v]);
  }

 private:
  // 32 columns of sixteen rows `at` bytes from `codes`, to every second vector.
  static void PackSub(const uint8_t* codes, __m512i at, __m512i* out) {
    const __m512i nibble = _mm512_set1_epi8(15), lift = _mm512_set1_epi8(static_cast<char>(kLift * (kBits == 4 ? 17 : 1)));
    for (int j = 0; j < kSteps * kBits / 8; ++j) {
      const __m512i raw = _mm512_xor_si512(_mm512_i32gather_epi32(at, codes + 4 * j, 1), lift);
      if constexpr (kBits == 8) {
        _mm512_store_si512(out + 2 * j, raw);
      } else {
        _mm512_store_si512(out + 2 * j, _mm512_and_si512(raw, nibble));
        _mm512_store_si512(out + 2 * (4 + j), _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
      }
    }
  }
};

}  // namespace
}  // namespace jaxchat::avx512
JAXCHAT_END

// ---------------------------------------------------------------- bfloat16 weights, many rows of x

JAXCHAT_BEGIN_WITH(JAXCHAT_FEATURES_BF16)
namespace jaxchat::avx512 {
namespace {

// The processor multiplies pairs of bfloat16 into float32 sums: activations are rounded to bfloat16, as bfloat16
// inference does everywhere. `cols` is even.
struct Bfloat16Tiles {
  static constexpr int64_t kRows = 32;
  static constexpr int kMost = 8;

  static int64_t Bytes(const Weights& w, int64_t m) { return m * w.cols * 2; }

  static void Prepare(const Weights& w, const float* x, int64_t, int64_t begin, int64_t end, void* out) {
    for (int64_t i = begin; i < end; ++i) {
      auto* to = static_cast<uint16_t*>(out) + i * w.cols;
      for (int64_t k = 0; k < w.cols; k += 16) {
        const __mmask16 mask = Mask(w.cols - k);
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i * w.inputs + k));
        _mm256_mask_storeu_epi16(to + k, mask, (__m256i)rounded);
      }
    }
  }

  static int64_t ScratchBytes(const Weights& w) { return kRows * w.cols * 2; }

  static void Run(const Weights& w, const void* prepared, int64_t m, float* y, int64_t begin, int64_t end,
                  void* scratch) {
    auto* tile = static_cast<__m512i*>(scratch);
    for (int64_t row = begin; row < end; row += kRows) {
      Pack(w, row, tile);
      InSteps<kMost>(m, [&](auto count, int64_t i) {
        const auto* x = static_cast<const uint16_t*>(prepared) + i * w.cols;
        Multiply<decltype(count)::value>(w, x, tile, y + i * w.rows + row, end - row);
      });
    }
  }

 private:
  static __mmask16 Mask(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

  // A tile: [pair of columns][vector][16 rows][2 columns].
  static void Pack(const Weights& w, int64_t begin, __m512i* tile) {
    const auto* codes = static_cast<const char*>(w.codes);
    for (int v = 0; v < 2; ++v) {
      alignas(64) int32_t at[16];
      const int64_t first = std::min(begin + v * 16, w.rows - 1);
      for (int64_t i = 0; i < 16; ++i)
        at[i] = static_cast<int32_t>((std::min(first + i, w.rows - 1) - first) * w.cols * 2);
      const __m512i rows = _mm512_load_si512(at);
      for (int64_t j = 0; j < w.cols / 2; ++j)
        _mm512_store_si512(tile + 2 * j + v, _mm512_i32gather_epi32(rows, codes + first * w.cols * 2 + 4 * j, 1));
    }
  }

  // M rows of x times a tile, of which `left` rows are there.
  template <int M>
  static void Multiply(const Weights& w, const uint16_t* x, const __m512i* tile, float* y, int64_t left) {
    __m512 acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t j = 0; j < w.cols / 2; ++j) {
      const auto w0 = (__m512bh)_mm512_load_si512(tile + 2 * j), w1 = (__m512bh)_mm512_load_si512(tile + 2 * j + 1);
      for (int m = 0; m < M; ++m) {
        const auto pair = (__m512bh)Splat4(x + m * w.cols + 2 * j);
        acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, pair);
        acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, pair);
      }
    }
    for (int v = 0; v < 2 && left > 16 * v; ++v)
      for (int m = 0; m < M; ++m) _mm512_mask_storeu_ps(y + m * w.rows + 16 * v, Mask(left - 16 * v), acc[m][v]);
  }
};

}  // namespace

const KernelTable kProducts = TableOf<Few, Tile>(kMany<Bfloat16Tiles>);

}  // namespace jaxchat::avx512
JAXCHAT_END
