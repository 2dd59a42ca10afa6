// GGUF's blocks of quantized weights -> codes, scales and minimums, each in an array of its own: what reference.py does,
// at the speed of memory. Bits are only moved: plain C++ that compilers turn into vectors.
#include <cstdint>
#include <cstring>

namespace jaxchat {
namespace {

// Arrays of a QuantizedTensor, from the first block that is to be read on.
struct Arrays {
  uint8_t* codes;
  uint8_t* high;
  uint8_t* scales;
  uint8_t* mins;
  uint8_t* super_scales;
  uint8_t* super_mins;
};

// Two codes a byte, of 32 bytes whose low or high halves (`shift` 0 or 4) are codes.
inline void PackHalves(const uint8_t* from, int shift, uint8_t* out, int count = 32) {
  for (int j = 0; j < count / 2; ++j)
    out[j] = static_cast<uint8_t>((from[2 * j] >> shift & 15) | (from[2 * j + 1] >> shift & 15) << 4);
}

// Where element 2 v + i of byte k of a run's high bits is among its columns: see packing.py.
constexpr int Column(int n, int k) { return n / 2 * 8 + 2 * k + n % 2; }

// Eight by eight bits, transposed: bit n of byte g becomes bit g of byte n (Warren, Hacker's Delight, 7-3).
inline uint64_t Transpose8(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000cccc0000ccccull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ull;
  return x ^ t ^ (t << 28);
}

// Four by four pairs of bits.
inline uint32_t Transpose4(uint32_t x) {
  uint32_t t = (x ^ (x >> 6)) & 0x00cc00ccu;
  x ^= t ^ (t << 6);
  t = (x ^ (x >> 12)) & 0x0000f0f0u;
  return x ^ t ^ (t << 12);
}

// Q4_0, Q4_1, Q5_0, Q5_1: float16 scale and minimum, fifth bits, nibbles of columns j and j + 16.
template <int kBits, bool kAffine>
void Simple(const uint8_t* block, int64_t count, const Arrays& to) {
  constexpr int kFifth = kAffine ? 4 : 2, kStart = kFifth + (kBits == 5 ? 4 : 0);
  for (int64_t b = 0; b < count; ++b, block += kStart + 16) {
    std::memcpy(to.scales + 2 * b, block, 2);
    if (kAffine) std::memcpy(to.mins + 2 * b, block + 2, 2);
    uint8_t* codes = to.codes + 16 * b;
    PackHalves(block + kStart, 0, codes, 16);
    PackHalves(block + kStart, 4, codes + 8, 16);
    if (kBits == 4 && !kAffine)  // in excess of 8 -> two's complement
      for (int j = 0; j < 16; ++j) codes[j] ^= 0x88;
    if (kBits == 5) {
      const uint8_t* bits = block + kFifth;  // of columns 8 v to 8 v + 7
      for (int k = 0; k < 4; ++k) {
        int out = 0;
        for (int v = 0; v < 4; ++v) out |= (bits[v] >> 2 * k & 3) << 2 * v;
        to.high[4 * b + k] = static_cast<uint8_t>(out);
      }
    }
  }
}

void Q8_0(const uint8_t* block, int64_t count, const Arrays& to) {
  for (int64_t b = 0; b < count; ++b, block += 34) {
    std::memcpy(to.scales + 2 * b, block, 2);
    std::memcpy(to.codes + 32 * b, block + 2, 32);
  }
}

// Eight scales and eight minimums of six bits: ggml's get_scale_min_k4.
inline void SixBits(const uint8_t* from, uint8_t* scales, uint8_t* mins) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = from[j] & 63;
    mins[j] = from[j + 4] & 63;
    scales[j + 4] = static_cast<uint8_t>((from[j + 8] & 15) | from[j] >> 6 << 4);
    mins[j + 4] = static_cast<uint8_t>(from[j + 8] >> 4 | from[j + 4] >> 6 << 4);
  }
}

template <int kBits>
void AffineK(const uint8_t* block, int64_t count, const Arrays& to) {
  constexpr int kStart = kBits == 5 ? 48 : 16;
  for (int64_t b = 0; b < count; ++b, block += kStart + 128) {
    std::memcpy(to.super_scales + 2 * b, block, 2);
    to.super_mins[2 * b] = block[2];
    to.super_mins[2 * b + 1] = block[3] ^ 0x80;  // minimums are subtracted there, and added here
    SixBits(block + 4, to.scales + 8 * b, to.mins + 8 * b);
    for (int c = 0; c < 4; ++c)
      for (int half = 0; half < 2; ++half)
        PackHalves(block + kStart + 32 * c, 4 * half, to.codes + 128 * b + 32 * c + 16 * half);
    if (kBits == 5)
      for (int k = 0; k < 4; ++k) {
        uint64_t bits = 0;  // byte n: a column's fifth bits in the eight runs
        for (int n = 0; n < 8; ++n) bits |= static_cast<uint64_t>(block[16 + Column(n, k)]) << 8 * n;
        bits = Transpose8(bits);
        for (int run = 0; run < 8; ++run) to.high[32 * b + 4 * run + k] = static_cast<uint8_t>(bits >> 8 * run);
      }
  }
}

void Q6_K(const uint8_t* block, int64_t count, const Arrays& to) {
  for (int64_t b = 0; b < count; ++b, block += 210) {
    std::memcpy(to.scales + 16 * b, block + 192, 16);
    std::memcpy(to.super_scales + 2 * b, block + 208, 2);
    for (int half = 0; half < 2; ++half) {
      const uint8_t *low = block + 64 * half, *bits = block + 128 + 32 * half;
      uint8_t *codes = to.codes + 128 * b + 64 * half, *high = to.high + 64 * b + 32 * half;
      for (int quarter = 0; quarter < 4; ++quarter)
        PackHalves(low + quarter % 2 * 32, quarter / 2 * 4, codes + 16 * quarter);
      for (int word = 0; word < 2; ++word)
        for (int k = 0; k < 4; ++k) {
          uint32_t pairs = 0;  // byte n: a column's two bits in the four quarters
          for (int n = 0; n < 4; ++n) pairs |= static_cast<uint32_t>(bits[Column(4 * word + n, k)]) << 8 * n;
          pairs = Transpose4(pairs);
          for (int quarter = 0; quarter < 4; ++quarter)
            high[8 * quarter + 4 * word + k] = static_cast<uint8_t>(pairs >> 8 * quarter);
        }
    }
  }
}

using Reader = void (*)(const uint8_t*, int64_t, const Arrays&);
// As in cpu.py.
constexpr Reader kReaders[] = {Simple<4, false>, Simple<4, true>, Simple<5, false>, Simple<5, true>,
                               Q8_0,             AffineK<4>,      AffineK<5>,       Q6_K};

}  // namespace
}  // namespace jaxchat

extern "C" void JaxchatReadBlocks(int64_t type, const uint8_t* blocks, int64_t count, uint8_t* codes, uint8_t* high,
                                  uint8_t* scales, uint8_t* mins, uint8_t* super_scales, uint8_t* super_mins) {
  jaxchat::kReaders[type](blocks, count, {codes, high, scales, mins, super_scales, super_mins});
}
