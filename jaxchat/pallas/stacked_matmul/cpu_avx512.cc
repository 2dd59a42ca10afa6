// x @ w.T for quantized and float weights on AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// Weights are unsigned bytes to VNNI (code + 8 or + 128); the offset's share is taken back as one number per 32
// columns. Few rows of x: reading the weights is all that matters, and they are read once, in order. Weights of 4 to 6
// bits meet activations of 8 bits, whose error is below the weights' own; 8-bit weights meet 15 bits, split into two
// signed bytes, q = 128 h + l. Many rows of x: a register tile of 32 weight rows, and 8 bits.
#define JAXCHAT_ISA JAXCHAT_AVX512
#include "../cpu_target.h"

#include "cpu_products-inl.h"

JAXCHAT_BEGIN
namespace jaxchat::avx512 {
namespace {

// ---------------------------------------------------------------- the order of columns

// 16 or 32 columns as signed bytes.
__m128i Narrow(const Ints (&q)[1]) { return _mm512_cvtepi32_epi8(Bits<__m512i>(q[0])); }

__m256i Narrow(const Ints (&q)[2]) {
  const __m128i low = _mm512_cvtepi32_epi8(Bits<__m512i>(q[0])), high = _mm512_cvtepi32_epi8(Bits<__m512i>(q[1]));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 16 or 32 columns as the nibbles of packed codes unpack: the even ones first.
__m128i EvenOdd(__m128i bytes) {
  return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
}

__m256i EvenOdd(__m256i bytes) {
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, split), 0b11011000);
}

// Puts the bits above the fourth on four low halves a lane: columns 8 v + 2 k + i of a run, k = 0 to 3, whose words of
// high bits are in `high` (see packing.py).
template <int kBits, int v, int i>
__m512i AddHigh(__m512i low, const __m512i* high) {
  if constexpr (kBits == 4 || kBits == 8) {
    return low;
  } else {
    constexpr int kWide = kBits - 4, kField = (2 * v + i) % (8 / kWide) * kWide;
    constexpr int kUp = std::max(4 - kField, 0), kDown = std::max(kField - 4, 0);
    const __m512i word = high[kWide == 1 ? 0 : v / 2];
    const __m512i moved = kUp > 0 ? _mm512_slli_epi32(word, kUp) : _mm512_srli_epi32(word, kDown);
    const __m512i mask = _mm512_set1_epi8(kWide == 1 ? 0x10 : 0x30);
    return _mm512_ternarylogic_epi32(moved, mask, low, 0xea);  // (moved & mask) | low
  }
}

// ---------------------------------------------------------------- a few rows of x

// A block is four vectors of codes, 16 units of 16 bytes: a run of 32 columns, or half of one of 8-bit codes.
// Each unit has a lane of 32 bits to itself, so that a sum over all four vectors keeps the sub-groups apart; the two of
// a run of 6-bit codes are in two vectors each.
constexpr int64_t kBytesInBlock = 256;
constexpr int64_t kUnits = 16;

constexpr int64_t Lane(int64_t unit) { return unit % 4 * 4 + unit / 4; }  // and the unit of a lane

// One block of columns of one row of x, in the order in which the codes meet it.
template <int kBits>
struct alignas(64) Block {
  static constexpr int64_t kSub = SubOf(kBits);
  static constexpr int64_t kColumns = kBits == 8 ? kBytesInBlock : 2 * kBytesInBlock;
  static constexpr int64_t kRuns = kColumns / kRun;
  static constexpr int64_t kSpread = kUnits / kRuns;  // lanes of a run
  static constexpr int kParts = kRun / kSub;          // sub-groups of a run
  int32_t q[4][2][kUnits];  // a lane's next four bytes of codes meet: even and odd columns, or low and high bytes
  float scale[kParts][kUnits];
  int32_t offset[kParts][kUnits];  // takes back the lift of the codes; in one lane of a sub-group
  float sum[kUnits];               // of the values, for affine weights; likewise
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

// The codes of one of four dealt vectors as unsigned bytes: even and odd columns, or the same twice.
template <int kBits, bool kAffine, int v>
inline void Unpack(__m512i raw, const __m512i* high, __m512i* codes) {
  if constexpr (kBits == 8) {
    codes[0] = codes[1] = _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80)));
  } else {
    const __m512i nibble = _mm512_set1_epi8(15);
    // Signed nibbles are lifted; all others are unsigned as they are.
    if constexpr (kBits == 4 && !kAffine) raw = _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x88)));
    codes[0] = AddHigh<kBits, v, 0>(_mm512_and_si512(raw, nibble), high);
    codes[1] = AddHigh<kBits, v, 1>(_mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble), high);
  }
}

// The scales of a block, and its minimums.
template <int kBits>
struct Factors {
  __m512 scale[Block<kBits>::kParts];
  __m512 min;
};

// Adds the products of a block to M sums.
template <int kBits, int M, bool kAffine>
inline void Step(__m512i* raw, const __m512i* high, const Factors<kBits>& by, const Block<kBits>* x, int64_t stride,
                 __m512* acc) {
  __m512i codes[4][2];
  Deal(raw);
  Unpack<kBits, kAffine, 0>(raw[0], high, codes[0]);
  Unpack<kBits, kAffine, 1>(raw[1], high, codes[1]);
  Unpack<kBits, kAffine, 2>(raw[2], high, codes[2]);
  Unpack<kBits, kAffine, 3>(raw[3], high, codes[3]);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Block<kBits>& block = x[m * stride];
    constexpr int kParts = Block<kBits>::kParts;
    __m512i sum[2] = {_mm512_load_si512(block.offset[0]),
                      kParts == 1 ? _mm512_setzero_si512() : _mm512_load_si512(block.offset[kParts - 1])};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512i& to = sum[kParts == 1 ? i : v / 2];
        to = _mm512_dpbusd_epi32(to, codes[v][i], _mm512_load_si512(block.q[v][i]));
      }
    const auto add = [&](__m512i total, int part) {
      const __m512 scale = _mm512_mul_ps(by.scale[part], _mm512_load_ps(block.scale[part]));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, acc[m]);
    };
    if constexpr (kParts == 1) {
      add(_mm512_add_epi32(sum[0], kBits == 8 ? _mm512_slli_epi32(sum[1], 7) : sum[1]), 0);
    } else {
      add(sum[0], 0);
      add(sum[1], 1);
    }
    if constexpr (kAffine) acc[m] = _mm512_fmadd_ps(by.min, _mm512_load_ps(block.sum), acc[m]);
  }
}

template <int kBits_, bool kAffine>
struct Few {
  static constexpr int kBits = kBits_;
  using Block = avx512::Block<kBits>;
  using Factors = avx512::Factors<kBits>;
  static constexpr int kMost = 8;

  static int64_t Blocks(const Weights& w) { return (w.cols + Block::kColumns - 1) / Block::kColumns; }

  static void Prepare(const Weights& w, const float* x, int64_t, Block* out) {
    for (int64_t b = 0; b < Blocks(w); ++b)
      for (int64_t r = 0; r < Block::kRuns; ++r) PrepareRun(w, x, b * Block::kColumns + r * kRun, r, out + b);
  }

  template <int M>
  static void Row(const Weights& w, const Groups& scales, const Groups& mins, const Block* x, int64_t row,
                  int64_t from, int64_t to, float* y) {
    const int64_t bytes = CodeBytes<kBits>(w.cols), stride = Blocks(w);
    const uint8_t *codes = Codes<kBits>(w, row), *high = High<kBits>(w, row);
    const int64_t whole = std::min(bytes / kBytesInBlock, to);
    __m512i raw[4], words[2];
    __m512 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
    const auto load = [&](int64_t b) {
      for (int v = 0; v < 4; ++v) raw[v] = _mm512_loadu_si512(codes + b * kBytesInBlock + v * 64);
      LoadHigh(high + b * kHighBytes, kHighBytes, words);
    };
    int64_t b = from;
    const auto all = [&](auto factors) {
      for (; b < whole; ++b) {
        Prefetch<kBytesInBlock>(codes + b * kBytesInBlock);
        if constexpr (kHighBytes > 0) Prefetch<kHighBytes>(high + b * kHighBytes);
        load(b);
        Step<kBits, M, kAffine>(raw, words, factors(b), x + b, stride, acc);
      }
    };
    if (scales.plain())
      all([&](int64_t b) { return PlainFactors(scales, mins, row, b); });
    else if (scales.integers())
      all([&](int64_t b) { return IntegerFactors(scales, mins, row, b); });
    for (; b < to; ++b) {
      const int64_t left = bytes - b * kBytesInBlock;
      if (left >= kBytesInBlock) {
        load(b);
      } else {
        for (int v = 0; v < 4; ++v)
          raw[v] = _mm512_maskz_loadu_epi8(Mask(left - v * 64), codes + b * kBytesInBlock + v * 64);
        LoadHigh(high + b * kHighBytes, HighBytes<kBits>(w.cols) - b * kHighBytes, words);
      }
      Step<kBits, M, kAffine>(raw, words, AnyFactors(scales, mins, row, b, w.cols / Block::kSub), x + b, stride, acc);
    }
    for (int m = 0; m < M; ++m) Put(_mm512_reduce_add_ps(acc[m]), from, y + m * w.rows + row);
  }

 private:
  static constexpr int64_t kSub = Block::kSub, kHighBytes = HighBytes<kBits>(Block::kColumns);

  static __mmask64 Mask(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0; }

  // Words of high bits, each to the lane of its run: the first of all runs, then, at 6 bits, the second.
  static void LoadHigh(const uint8_t* from, int64_t bytes, __m512i* out) {
    if constexpr (kBits == 5) {
      const __m512i at = _mm512_load_si512(kLanes16.lane);
      out[0] = _mm512_permutexvar_epi32(at, _mm512_maskz_loadu_epi8(Mask(bytes), from));
    } else if constexpr (kBits == 6) {
      const __m512i first = _mm512_maskz_loadu_epi8(Mask(bytes), from);
      const __m512i second = _mm512_maskz_loadu_epi8(Mask(bytes - 64), from + 64);
      const __m512i at = _mm512_slli_epi32(_mm512_load_si512(kLanes16.lane), 1);
      out[0] = _mm512_permutex2var_epi32(first, at, second);
      out[1] = _mm512_permutex2var_epi32(first, _mm512_or_si512(at, _mm512_set1_epi32(1)), second);
    }
  }

  static void PrepareRun(const Weights& w, const float* x, int64_t start, int64_t r, Block* block) {
    alignas(32) int32_t fours[2][8];
    Quantized<kSub> subs[Block::kParts];
    for (int p = 0; p < Block::kParts; ++p)
      subs[p] = Quantize<kSub>(x + start + p * kSub, w.inputs - start - p * kSub, kBits == 8 ? 16256 : 127);
    if constexpr (kBits == 8) {  // q = 128 high + low
      const Ints* q = subs[0].q;
      const Ints high[2] = {(q[0] + 64) >> 7, (q[1] + 64) >> 7};
      const Ints low[2] = {q[0] - (high[0] << 7), q[1] - (high[1] << 7)};
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours[0]), Narrow(low));
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours[1]), Narrow(high));
    } else {
      Ints q[2];
      std::memcpy(&q[0], subs[0].q, sizeof subs[0].q);
      if constexpr (Block::kParts == 2) q[1] = subs[1].q[0];
      _mm256_store_si256(reinterpret_cast<__m256i*>(fours[0]), EvenOdd(Narrow(q)));
    }
    for (int64_t i = 0; i < Block::kSpread; ++i) {
      const int64_t lane = Lane(r * Block::kSpread + i);
      for (int v = 0; v < 4; ++v)
        for (int part = 0; part < 2; ++part)
          block->q[v][part][lane] = kBits == 8 ? fours[part][4 * i + v] : fours[0][4 * part + v];
      block->sum[lane] = i ? 0 : subs[0].sum;
      for (int p = 0; p < Block::kParts; ++p) {
        block->scale[p][lane] = subs[p].scale;
        block->offset[p][lane] = i ? 0 : -kLift * subs[p].total;
      }
    }
  }

  static constexpr int kLift = kBits == 8 ? 128 : LiftOf(kBits, kAffine);

  struct Lanes {
    alignas(64) int32_t lane[kUnits];
  };
  static constexpr Lanes kLanes16 = [] {
    Lanes lanes{};
    for (int64_t i = 0; i < kUnits; ++i) lanes.lane[i] = static_cast<int32_t>(Lane(i));
    return lanes;
  }();

  // float16 of a block's runs, each to its lanes.
  static __m512 Spread(__m256i halves) {
    alignas(64) static constexpr Lanes kFrom = [] {
      Lanes from{};
      for (int64_t i = 0; i < kUnits; ++i) from.lane[i] = static_cast<int32_t>(Lane(i) / Block::kSpread);
      return from;
    }();
    return _mm512_permutexvar_ps(_mm512_load_si512(kFrom.lane), _mm512_cvtph_ps(halves));
  }

  static __m512 Plain(const Groups& groups, int64_t row, int64_t b) {
    const auto* from = reinterpret_cast<const __m256i*>(groups.Plain(row, b * Block::kRuns));
    if constexpr (kBits == 8) return Spread(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    return Spread(_mm256_loadu_si256(from));
  }

  static Factors PlainFactors(const Groups& scales, const Groups& mins, int64_t row, int64_t b) {
    Factors out{};
    if constexpr (Block::kParts == 1) out.scale[0] = Plain(scales, row, b);
    if constexpr (kAffine) out.min = Plain(mins, row, b);
    return out;
  }

  // Integer scales of a block of two times 256 columns, and the two numbers they are times.
  static __m512 Integers(__m128i bytes, __m512 outer) {
    const __m128i lanes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(bytes, lanes))), outer);
  }

  static __m512 Outer(const Groups& groups, int64_t row, int64_t b) {
    int32_t two;
    std::memcpy(&two, groups.Outer(row, b * (Block::kColumns / kSub)), sizeof two);
    const __m512 both = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(two)));
    static constexpr Lanes kFrom = [] {
      Lanes from{};
      for (int64_t i = 0; i < kUnits; ++i) from.lane[i] = static_cast<int32_t>(Lane(i) / (kUnits / 2));
      return from;
    }();
    return _mm512_permutexvar_ps(_mm512_load_si512(kFrom.lane), both);
  }

  static Factors IntegerFactors(const Groups& scales, const Groups& mins, int64_t row, int64_t b) {
    Factors out{};
    const auto* from = scales.Integers(row, b * (Block::kColumns / kSub));
    const __m512 outer = Outer(scales, row, b);
    if constexpr (Block::kParts == 1) {
      out.scale[0] = Integers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), outer);
    } else {
      const __m256i pairs = EvenOdd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      out.scale[0] = Integers(_mm256_castsi256_si128(pairs), outer);
      out.scale[1] = Integers(_mm256_extracti128_si256(pairs, 1), outer);
    }
    if constexpr (kAffine) {
      const auto* lowest = reinterpret_cast<const __m128i*>(mins.Integers(row, b * Block::kRuns));
      out.min = Integers(_mm_loadu_si128(lowest), Outer(mins, row, b));
    }
    return out;
  }

  // Of a block that the row may end in: of its first `subs` sub-groups, and zeros.
  static __m512 Any(const Groups& groups, int64_t row, int64_t b, int part, int64_t subs) {
    Floats lanes{};
    for (int64_t r = 0; r < Block::kRuns; ++r) {
      const int64_t sub = (b * Block::kRuns + r) * Block::kParts + part;
      if (sub >= subs) break;
      for (int64_t i = 0; i < Block::kSpread; ++i) lanes[Lane(r * Block::kSpread + i)] = groups.At(row, sub);
    }
    return Bits<__m512>(lanes);
  }

  static Factors AnyFactors(const Groups& scales, const Groups& mins, int64_t row, int64_t b, int64_t subs) {
    Factors out{};
    for (int p = 0; p < Block::kParts; ++p) out.scale[p] = Any(scales, row, b, p, subs);
    if constexpr (kAffine) out.min = Any(mins, row, b, 0, subs);
    return out;
  }
};

// ---------------------------------------------------------------- many rows of x

inline __m512i Splat4(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// [step of four columns][vector][16 rows][4 columns] of bytes, in the column order of the packed codes.
template <int kBits_, bool kAffine_>
struct Tile {
  using Code = uint8_t;
  using Input = int8_t;
  static constexpr int kBits = kBits_;
  static constexpr int64_t kSub = SubOf(kBits);
  static constexpr bool kAffine = kAffine_;
  static constexpr int64_t kRows = 32, kPart = int64_t{1} << 32, kPanel = 1;
  static constexpr int kMost = 6;  // 24 accumulators of the 32 registers
  static constexpr int kLevels = 127, kInputs = kSub, kCodes = kSub;
  static constexpr int kSteps = kSub / 4;                                  // in a sub-group
  static constexpr int kLift = kBits == 8 ? 128 : LiftOf(kBits, kAffine);

  static int32_t Prepare(const Quantized<kSub>& x, int64_t, int8_t* out) {
    const auto bytes = Narrow(x.q);
    const auto ordered = kBits == 8 ? bytes : EvenOdd(bytes);
    std::memcpy(out, &ordered, sizeof ordered);
    return -kLift * x.total;
  }

  static void Pack(const Weights& w, const int64_t* rows, int64_t from, int64_t to, uint8_t* out) {
    for (int v = 0; v < 2; ++v, rows += 16) {
      const __m512i at = Offsets(rows, CodeBytes<kBits>(w.cols)), high_at = Offsets(rows, HighBytes<kBits>(w.cols));
      const uint8_t *codes = Codes<kBits>(w, rows[0], from), *high = High<kBits>(w, rows[0], from);
      auto* steps = reinterpret_cast<__m512i*>(out) + v;
      for (int64_t s = from; s < to; s += kRun) {
        PackRun(codes, at, high, high_at, steps);
        codes += CodeBytes<kBits>(kRun);
        high += HighBytes<kBits>(kRun);
        steps += 2 * kSteps * (kRun / kSub);
      }
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
  // Of sixteen rows from the first, within the tile: less than 2 GB.
  static __m512i Offsets(const int64_t* rows, int64_t bytes) {
    alignas(64) int32_t offsets[16];
    for (int i = 0; i < 16; ++i) offsets[i] = static_cast<int32_t>((rows[i] - rows[0]) * bytes);
    return _mm512_load_si512(offsets);
  }

  // 32 columns of sixteen rows `at` bytes from `codes`, to every second vector.
  static void PackRun(const uint8_t* codes, __m512i at, const uint8_t* high, __m512i high_at, __m512i* out) {
    if constexpr (kBits == 8) {
      for (int j = 0; j < 8; ++j) {
        const __m512i raw = _mm512_i32gather_epi32(at, codes + 4 * j, 1);
        _mm512_store_si512(out + 2 * j, _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80))));
      }
    } else {
      __m512i words[2];
      for (int i = 0; i < kBits - 4; ++i) words[i] = _mm512_i32gather_epi32(high_at, high + 4 * i, 1);
      PackFour<0>(codes, at, words, out);
      PackFour<1>(codes, at, words, out);
      PackFour<2>(codes, at, words, out);
      PackFour<3>(codes, at, words, out);
    }
  }

  // Columns 8 v to 8 v + 7 of a run: the even ones are a step, the odd ones another.
  template <int v>
  static void PackFour(const uint8_t* codes, __m512i at, const __m512i* words, __m512i* out) {
    constexpr int kHalf = kSteps / 2, kFirst = v / kHalf * kSteps + v % kHalf;
    __m512i pair[2];
    Unpack<kBits, kAffine, v>(_mm512_i32gather_epi32(at, codes + 4 * v, 1), words, pair);
    _mm512_store_si512(out + 2 * kFirst, pair[0]);
    _mm512_store_si512(out + 2 * (kFirst + kHalf), pair[1]);
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
