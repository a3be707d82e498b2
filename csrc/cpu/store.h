// Quantise new keys and values and write them into their pages.
#pragma once
#include <cstring>
#include <limits>

#include "rows.h"

namespace jettison::JETTISON_TIER {

struct Quantised {
  uint8_t codes[256];
  uint16_t meta[2];  // fp16 scale, zero
};

// See codec.quantise: zero rounded down, scale rounded up, so no code is clipped; of a rotated row at 2 bits the
// codes span the middle three quarters of the range.
inline void quantise(const float* row, int size, int bits, bool rotated, Quantised* out) {
  F low = fload(row), high = low, poison = fzero();
  for (int d = 0; d < size; d += 16) {
    const F x = fload(row + d);
    low = sub(fzero(), max(sub(fzero(), low), sub(fzero(), x)));
    high = max(high, x);
    poison = add(poison, sub(x, x));  // NaN if any element is NaN or infinite
  }
  float minimum = -hmax(sub(fzero(), low)), maximum = hmax(high);
  if (rotated && bits == 2) {
    const float cut = (maximum - minimum) * 0.125f;
    minimum += cut, maximum -= cut;
  }
  const float levels = (float)((1 << bits) - 1);
  const float zero = half_float(out->meta[1] = float_half_directed(minimum, false));
  const float scale = half_float(out->meta[0] = float_half_directed((maximum - zero) / levels, true));
  if (!(hsum(poison) == 0) || !(std::fabs(zero) < std::numeric_limits<float>::infinity()) ||
      !(scale < std::numeric_limits<float>::infinity())) {
    out->meta[0] = out->meta[1] = 0x7e00;
    std::memset(out->codes, 0, size);
    return;
  }
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int d = 0; d < size; d++) {
    const float code = std::nearbyintf((row[d] - zero) * inverse);
    out->codes[d] = (uint8_t)(code < 0 ? 0 : code > levels ? levels : code);
  }
}

// size codes -> size*bits/8 bytes, the first code in the low bits
inline void pack(const uint8_t* codes, int size, int bits, uint8_t* bytes) {
  if (bits == 8) std::memcpy(bytes, codes, size);
  if (bits == 4)
    for (int i = 0; i < size / 2; i++) bytes[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
  if (bits == 2)
    for (int i = 0; i < size / 4; i++) {
      const uint8_t* c = codes + 4 * i;
      bytes[i] = (uint8_t)(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
    }
}

inline void raw16(const float* row, int size, Dtype dtype, uint8_t* bytes) {
  for (int d = 0; d < size; d++) {
    const uint16_t h = dtype == Dtype::kFloat16 ? float_half(row[d]) : float_bf16(row[d]);
    std::memcpy(bytes + 2 * d, &h, 2);
  }
}

// One side of a token as packed bytes; returns whether it has a scale and zero.
inline bool encode(const float* row, int size, int bits, bool rotated, Dtype dtype, uint8_t* bytes, uint16_t* meta) {
  if (bits == 16) {
    raw16(row, size, dtype, bytes);
    return false;
  }
  Quantised q;
  quantise(row, size, bits, rotated, &q);
  pack(q.codes, size, bits, bytes);
  std::memcpy(meta, q.meta, 4);
  return true;
}

inline void write_keys(uint8_t* tile, const Page& page, int token, const uint8_t* bytes) {
  const int row = page.key_row_bytes();
  for (int b = 0; b < row; b += 64) std::memcpy(tile + page.key_offset(token, b), bytes + b, row - b < 64 ? row - b : 64);
}

inline void write_values(uint8_t* tile, const Page& page, int token, const uint8_t* bytes) {
  const int groups = page.value_groups(), planes = page.value_planes(), width = page.value_width();
  for (int plane = 0; plane < planes; plane++)
    for (int g = 0; g < groups; g++) {
      const int word = (g * planes + plane) * width;
      uint8_t* at = tile + page.value_offset(token, word);
      for (int w = 0; w < width; w++) std::memcpy(at + 4 * w, bytes + 2 * (word + w), 2);
    }
}

// Keys as they are quantised: centred, equalised, rotated.
inline void code_key(const StoreArgs& a, int head, int size, float* key) {
  if (a.key_center)
    for (int d = 0; d < size; d++) key[d] -= a.key_center[head * size + d];
  if (a.key_inverse)
    for (int d = 0; d < size; d++) key[d] *= a.key_inverse[head * size + d];
  if (a.rotate) hadamard(key, size);
}

inline void store_token(const StoreArgs& a, int64_t token, int head) {
  const Page& page = a.cache.page;
  const int size = page.head_size, block_size = a.cache.block_size;
  const int64_t slot = a.slots[token];
  const int offset = (int)(slot % block_size), row = offset % kTile;
  uint8_t* cells = a.cache.data + slot / block_size * a.cache.block_stride + head * a.cache.head_stride;
  uint8_t* tile = cells + offset / kTile * page.tile_bytes();
  uint8_t* sinks = cells + block_size / kTile * page.tile_bytes();
  const bool sink = offset < page.sink_tokens;

  alignas(64) float raw[256], coded[256];
  alignas(64) uint8_t bytes[512];
  uint16_t meta[4];
  int filled = 0;

  load_row_floats(a.key, token, head, size, raw);
  std::memcpy(coded, raw, 4 * size);
  code_key(a, head, size, coded);
  filled += 2 * encode(page.key_bits == 16 ? raw : coded, size, page.key_bits, a.rotate, a.key.dtype, bytes, meta);
  write_keys(tile, page, row, bytes);
  if (sink) raw16(coded, size, Dtype::kFloat16, sinks + offset * size * 2);

  load_row_floats(a.value, token, head, size, raw);
  std::memcpy(coded, raw, 4 * size);
  if (a.rotate) hadamard(coded, size);
  filled += 2 * encode(page.value_bits == 16 ? raw : coded, size, page.value_bits, a.rotate, a.value.dtype, bytes, meta + filled);
  write_values(tile, page, row, bytes);
  if (sink) raw16(coded, size, Dtype::kFloat16, sinks + (page.sink_tokens + offset) * size * 2);

  if (filled) std::memcpy(tile + page.meta_offset(row), meta, 2 * filled);
}

void store(const StoreArgs& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; token++)
    if (a.slots[token] >= 0)
      for (int head = 0; head < a.heads; head++) store_token(a, token, head);
}

}  // namespace jettison::JETTISON_TIER
