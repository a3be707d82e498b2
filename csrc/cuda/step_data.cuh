// What a warp holds of 32 tokens: packed words of both tiles, scales and zeros.
#pragma once
#include "attention.cuh"

namespace jt {

JT_DEVICE int lane_group() { return (thread() & 31) >> 2; }
JT_DEVICE int quarter() { return thread() & 3; }

template <class S>
struct StepData {
  using P = typename S::P;
  using K = typename S::K;
  using V = typename S::V;
  static constexpr int KB = S::KB, VB = S::VB, SUB = S::SUB;

  u32 k[2][2][K::words], v[2][2][V::words];
  u32 key_scale[SUB][2], value_scale[SUB][2];  // fp16 scale, zero above it

  JT_DEVICE void load_keys(const u8* step) {
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int r = 0; r < 2; r++) K::load(k[u][r], step + u * P::tile, lane_group() + 8 * r, quarter());
  }
  JT_DEVICE void load_values(const u8* step) {
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int r = 0; r < 2; r++) V::load(v[u][r], step + u * P::tile, r, lane_group(), quarter());
  }

  // Scales and zeros of tokens g and g + 8.
  JT_DEVICE void load_scales(const u8* step) {
    constexpr int words = P::meta ? P::meta / 2 : 1;
    if constexpr (P::meta == 0) return;
#pragma unroll
    for (int u = 0; u < SUB; u++) {
      u32 x[words];
      load_words<words>(x, step + (S::PAIR ? quarter() >> 1 : u) * P::tile + P::meta_start + lane_group() * 2 * P::meta);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if constexpr (KB < 16) key_scale[u][r] = x[r * (P::meta / 4)];
        if constexpr (VB < 16) value_scale[u][r] = x[r * (P::meta / 4) + P::meta / 4 - 1];
      }
    }
  }

  // Outside [from, to) a page may hold anything, NaN too, and 0 * NaN is NaN: take zeros.
  static JT_DEVICE bool outside(i32 at, i32 from, i32 to) { return at < from || at >= to; }
  JT_DEVICE void clear_scales(i32 token, i32 from, i32 to) {
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (outside(token + 16 * (S::PAIR ? quarter() >> 1 : u) + lane_group() + 8 * r, from, to))
          key_scale[u][r] = value_scale[u][r] = 0;
  }
  JT_DEVICE void clear_values(i32 token, i32 from, i32 to) {
    if constexpr (VB < 16) return;
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const i32 even = token + 16 * u + 8 * r + 2 * quarter();
        const u32 keep = (outside(even, from, to) ? 0u : 0x0000ffffu) | (outside(even + 1, from, to) ? 0u : 0xffff0000u);
#pragma unroll
        for (int w = 0; w < V::words; w++) v[u][r][w] &= keep;
      }
  }
};

}  // namespace jt
