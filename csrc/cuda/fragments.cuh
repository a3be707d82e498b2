// From packed words to operands of mma.m16n8k16, for keys (tokens x channels) and values (channels x tokens).
//
// Codes are used as fp16 denormals: (x & 0x000f000f) is code * 2^-24 exactly, (x & 0x00f000f0) is code * 2^-20, and the
// tensor core takes denormals exactly at full rate; the powers of two go into the query and into the final store.
// A lane (g, t) = (lane / 4, lane % 4) owns rows g and g + 8. The channel order that unpacking yields is matched by
// permuting the query once.
#pragma once
#include "page.cuh"

namespace jt {

// One word -> registers of two codes each, the exponent of register j being 2^(exponent - 24).
template <int B>
constexpr JT_DEVICE int exponent(int j) {
  return B == 4 ? (j & 1) * 4 : B == 2 ? (j < 5 ? 2 * j : 2 * (j - 5)) : 0;
}
template <int B>
JT_DEVICE void unpack(u32 x, u32* h) {
  if constexpr (B == 16) {
    h[0] = x;
  } else if constexpr (B == 8) {
    h[0] = x & 0x00ff00ffu;
    h[1] = (x >> 8) & 0x00ff00ffu;
  } else if constexpr (B == 4) {
    const u32 y = x >> 8;
    h[0] = x & 0x000f000fu, h[1] = x & 0x00f000f0u;
    h[2] = y & 0x000f000fu, h[3] = y & 0x00f000f0u;
  } else {
    const u32 y = x >> 10;
    h[0] = x & 0x00030003u, h[1] = x & 0x000c000cu, h[2] = x & 0x00300030u, h[3] = x & 0x00c000c0u;
    h[4] = x & 0x03000300u;
    h[5] = y & 0x00030003u, h[6] = y & 0x000c000cu, h[7] = y & 0x00300030u;
  }
}

// The keys of one row as lane quarter t reads them: D/8 registers.
template <int D, int B>
struct KeyRow {
  static constexpr int row = D * B / 8, planes = (row + 63) / 64;
  static constexpr bool split = row / 4 % 4 != 0;  // 6 bytes per lane (D = 96 at 2 bits): one word and a half
  static constexpr int words = (row + 15) / 16, per_word = 16 / B;
  static_assert(row % 16 == 0 || (split && planes == 1 && row == 24), "unsupported head size");

  static JT_DEVICE void load(u32* to, const u8* tile, int r, int t) {
    if constexpr (split) {
      const u16* p = reinterpret_cast<const u16*>(tile + r * row + t * 6);
      to[0] = p[0] | (u32)p[1] << 16;
      to[1] = (p[2] & 0xffu) | (u32)(p[2] >> 8) << 16;
    } else {
#pragma unroll
      for (int p = 0; p < planes; p++) {
        const int left = row - 64 * p;
        if (left >= 64)
          load_words<4>(to + 4 * p, tile + 1024 * p + r * 64 + t * 16);
        else if (left == 48)
          load_words<3>(to + 4 * p, tile + 1024 * p + r * 48 + t * 12);
        else if (left == 32)
          load_words<2>(to + 4 * p, tile + 1024 * p + r * 32 + t * 8);
        else
          load_words<1>(to + 4 * p, tile + 1024 * p + r * 16 + t * 4);
      }
    }
  }
  // registers in word w
  static constexpr JT_DEVICE int registers(int w) { return split && w == 1 ? 4 : per_word; }
  // channel of half `high` of register j of word w
  static constexpr JT_DEVICE int channel(int t, int w, int j, int high) {
    if (split) return t * 24 + (w == 0 ? j + 8 * high : 16 + j + 4 * high);
    const int p = w / 4, left = row - 64 * p < 64 ? row - 64 * p : 64;
    return (p * 64 + t * (left / 4)) * 8 / B + (w % 4) * (32 / B) + (B == 16 ? high : j + per_word * high);
  }
};

// The values of a token pair per lane: D/8 registers, each one channel of the even (low) and odd (high) token.
template <int D, int KB, int B>
struct ValuePair {
  using P = Page<D, KB, B, 0>;
  static constexpr bool split = P::groups == 4;  // D = 96 at 2 bits: two lanes share three words
  static constexpr int words = split ? 2 : P::per_group, per_word = 16 / B;
  static_assert(P::groups == 8 || (split && P::per_group == 3), "unsupported head size");

  static JT_DEVICE void load(u32* to, const u8* tile, int half, int g, int t) {
    if constexpr (split) {
      to[0] = *reinterpret_cast<const u32*>(tile + P::value_word((g & 1) * 2, half, g >> 1, t));
      to[1] = *reinterpret_cast<const u32*>(tile + P::value_word(1, half, g >> 1, t)) >> 8 * (g & 1);
    } else {
#pragma unroll
      for (int p = 0; p < P::planes; p++) load_words<P::width>(to + p * P::width, tile + P::value_word(p, half, g, t));
    }
  }
  static constexpr JT_DEVICE int registers(int w) { return split && w == 1 ? 4 : per_word; }
  static constexpr JT_DEVICE int exponent_of(int i) { return exponent<B>(split && i >= 8 ? i - 8 : i % per_word); }
};

}  // namespace jt
