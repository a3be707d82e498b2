// The next 128 tokens of an item: where their tiles are, their scales and zeros.
#pragma once
#include "job.h"

namespace jettison::JETTISON_TIER {

// The page that holds a token.
inline const uint8_t* page_cells(const Job& job, int64_t token) {
  const Cache& cache = job.args.cache;
  const int32_t* table = job.args.block_table + job.item.sequence * job.args.block_table_stride;
  return cache.data + table[token / cache.block_size] * cache.block_stride + job.item.head * cache.head_stride;
}

// Slots outside the sequence and its window hold anything, and a weight of zero does not hide a NaN. 16-bit values have
// no scale that could be zeroed: a tile before the window is replaced by zeros, and of the last tile a copy is read in
// which the slots from `live` on are cleared.
inline const uint8_t* readable_values(const Job& job, const uint8_t* tile, int live, bool before_window) {
  alignas(64) static constexpr uint8_t kZeros[kTile * kMaxHead * 4 + kTile * 4] = {};
  if (before_window) return kZeros;
  if (live >= kTile) return tile;
  uint8_t* copy = job.w.last_tile;
  std::memcpy(copy, tile, job.page.tile_bytes());
  for (int token = live; token < kTile; token++)
    for (int word = 0; word < job.size; word++) std::memset(copy + job.page.value_offset(token, word), 0, 2);
  return copy;
}

inline void load_chunk(const Job& job, int64_t first_token, int64_t limit) {
  Chunk& chunk = job.w.chunk;
  const Cache& cache = job.args.cache;
  const Page& page = job.page;
  chunk.first_token = first_token;
  chunk.num_tiles = (int)((std::min<int64_t>(limit - first_token, kChunkTokens) + kTile - 1) / kTile);
  chunk.sinks = nullptr;
  const int sinks = first_token == 0 ? page.sink_tokens : 0;
  for (int t = 0; t < chunk.num_tiles; t++) {
    const int64_t token = first_token + kTile * t;
    const uint8_t* cells = page_cells(job, token);
    const uint8_t* tile = cells + token % cache.block_size / kTile * page.tile_bytes();
    const int live = (int)std::min<int64_t>(limit - token, kTile);
    chunk.tiles[t] =
        page.value_bits == 16 ? readable_values(job, tile, live, token + kTile <= job.visible(0).from) : tile;
    const int64_t next = token + kChunkTokens;
    chunk.next_tiles[t] =
        next < limit ? page_cells(job, next) + next % cache.block_size / kTile * page.tile_bytes() : nullptr;
    if (sinks && t == 0) chunk.sinks = cells + cache.block_size / kTile * page.tile_bytes();
    // Slots that were never written hold anything, NaN included; sink tokens are added apart.
    const Mask written = lanes(0, live), packed = lanes(t == 0 ? sinks : 0, live);
    const uint8_t* meta = tile + page.key_bytes() + page.value_bytes();
    F scale, zero;
    if (page.key_bits < 16) {
      load_meta(meta, page.meta_bytes(), 0, &scale, &zero);
      fstore(chunk.key_scale + 16 * t, select(written, scale, fzero()));
      fstore(chunk.key_zero + 16 * t, select(written, zero, fzero()));
    }
    if (page.value_bits < 16) {
      load_meta(meta, page.meta_bytes(), page.key_bits < 16, &scale, &zero);
      fstore(chunk.value_scale + 16 * t, select(packed, scale, fzero()));
      fstore(chunk.value_zero + 16 * t, select(packed, zero, fzero()));
    }
  }
}

}  // namespace jettison::JETTISON_TIER
