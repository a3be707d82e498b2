// Geometry of a packed page, as csrc/layout.py defines it, at compile time.
#pragma once
#include "primitives.cuh"

namespace jt {

template <int D, int KB, int VB, int SINKS>
struct Page {
  static constexpr int key_row = D * KB / 8, key_bytes = 16 * key_row, value_bytes = 2 * D * VB;
  static constexpr int key_meta = KB < 16 ? 4 : 0, value_meta = VB < 16 ? 4 : 0, meta = key_meta + value_meta;
  static constexpr int meta_start = key_bytes + value_bytes, tile = meta_start + 16 * meta;
  static constexpr int words = D * VB / 16;  // 32-bit words per pair of tokens
  static constexpr int groups = words % 8 == 0 ? 8 : words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
  static constexpr int per_group = words / groups;
  static constexpr int width = per_group % 4 == 0 ? 4 : per_group % 2 == 0 ? 2 : 1, planes = per_group / width;

  // byte `byte` of the key row of token r
  static constexpr JT_DEVICE int key(int r, int byte) {
    const int plane = byte / 64, w = key_row - 64 * plane < 64 ? key_row - 64 * plane : 64;
    return plane * 1024 + r * w + byte % 64;
  }
  // first word of channel group `group` in `plane` for token pair `pair` of `half`
  static constexpr JT_DEVICE int value_word(int plane, int half, int group, int pair) {
    return key_bytes + 4 * ((((plane * 2 + half) * groups + group) * 4 + pair) * width);
  }
  // 16-bit granule `word` of the values of token r
  static constexpr JT_DEVICE int value(int r, int word) {
    const int group = word / per_group, inner = word % per_group;
    return value_word(inner / width, r / 8, group, r % 8 / 2) + 4 * (inner % width) + 2 * (r & 1);
  }
  static constexpr JT_DEVICE int scales(int r) { return meta_start + (r % 8 * 2 + r / 8) * meta; }
};

}  // namespace jt
