// Where every byte of a packed page lies: the C++ twin of csrc/layout.py, which documents the format.
#pragma once
#include <cstdint>

namespace jettison {

// Never emitted out of line: a copy compiled for a newer processor must not be linked into an older tier.
#define JETTISON_INLINE [[gnu::always_inline]] inline

constexpr int kTile = 16;  // tokens of a tile

struct Page {
  int head_size, key_bits, value_bits, sink_tokens;

  JETTISON_INLINE int key_row_bytes() const { return head_size * key_bits / 8; }
  JETTISON_INLINE int key_bytes() const { return kTile * key_row_bytes(); }
  JETTISON_INLINE int value_bytes() const { return kTile * head_size * value_bits / 8; }
  JETTISON_INLINE int meta_bytes() const { return 4 * (key_bits < 16) + 4 * (value_bits < 16); }
  JETTISON_INLINE int tile_bytes() const { return key_bytes() + value_bytes() + kTile * meta_bytes(); }
  JETTISON_INLINE int bytes_per_token(int block_size) const {
    return tile_bytes() / kTile + (sink_tokens * head_size * 4 + block_size - 1) / block_size;
  }

  // Words of a token pair = groups * planes * width.
  JETTISON_INLINE int value_groups() const {
    int groups = 8;
    while (head_size * value_bits / 16 % groups) groups /= 2;
    return groups;
  }
  JETTISON_INLINE int value_width() const {
    const int per_group = head_size * value_bits / 16 / value_groups();
    return per_group % 4 == 0 ? 4 : per_group % 2 == 0 ? 2 : 1;
  }
  JETTISON_INLINE int value_planes() const { return head_size * value_bits / 16 / value_groups() / value_width(); }

  JETTISON_INLINE int key_offset(int token, int byte) const {
    const int plane = byte / 64, row = key_row_bytes(), rest = row - 64 * plane;
    return plane * 64 * kTile + token * (rest < 64 ? rest : 64) + byte % 64;
  }
  JETTISON_INLINE int value_offset(int token, int word) const {
    const int groups = value_groups(), planes = value_planes(), width = value_width();
    const int half = token / 8, pair = token % 8 / 2, odd = token % 2;
    const int group = word / (planes * width), inner = word % (planes * width);
    const int plane = inner / width, column = inner % width;
    return key_bytes() + 4 * ((((plane * 2 + half) * groups + group) * 4 + pair) * width + column) + 2 * odd;
  }
  JETTISON_INLINE int meta_offset(int token) const {
    return key_bytes() + value_bytes() + (token % 8 * 2 + token / 8) * meta_bytes();
  }
};

}  // namespace jettison
