// Weighted sum of one chunk's packed values.
//
// A 32-bit word holds the same channels of two tokens, so each field of it is one dot2 with a pair of weights.
// Accumulators stay in the order of the stored words ("lane order"); fold_lanes puts them into channel order.
#pragma once
#include "scores.h"

namespace jettison::JETTISON_TIER {

// How the words of a value area lie in 64-byte vectors.
struct ValueMap {
  int vectors;        // 64-byte vectors of one plane and half (merged: of one plane)
  int planes, halves; // halves = 1 if one vector spans both halves (32-byte half planes)
  int half_bytes;
  alignas(64) int32_t index[2][16];  // lane -> token pair of the tile, per half
};

inline ValueMap value_map(const Page& page) {
  ValueMap map;
  const int width = page.value_width();
  map.half_bytes = page.value_groups() * 16 * width;
  map.planes = page.value_planes();
  const bool merged = map.half_bytes < 64;
  map.halves = merged ? 1 : 2;
  map.vectors = merged ? 1 : map.half_bytes / 64;
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < 16; lane++)
      map.index[half][lane] = (merged ? lane / 8 : half) * 4 + lane / width % 4;
  return map;
}

// Accumulator vectors per query row.
inline int value_accumulators(const Page& page) {
  const ValueMap map = value_map(page);
  const int fields = page.value_bits == 16 ? 1 : 16 / page.value_bits;
  return map.planes * map.vectors * fields;
}

constexpr int kChunkTiles = kChunkTokens / kTile;
// Weights of one row and chunk, spread to lanes: [tile][half][even/odd][16]; below 16 bits only [..][0] is used.
using Weights = int32_t[kChunkTiles][2][2][16];

template <int kBits, Raw16 kRaw, int kRows, int kFrom, int kTo>
inline void vector_step(const uint8_t* bytes, const Weights* weights, int tile, int half, auto (*acc)[kRows]) {
  const I x = iload(bytes);
  if constexpr (kBits == 16) {
    F even, odd;
    if constexpr (kRaw == Raw16::kBFloat16) even = bf16_low(x), odd = bf16_high(x);
    else even = fp16_low(x), odd = fp16_high(x);
    for (int m = 0; m < kRows; m++) {
      const float* w = (const float*)weights[m][tile][half];
      acc[0][m] = fma(odd, fload(w + 16), fma(even, fload(w), acc[0][m]));
    }
  } else if constexpr (kFrom < kTo) {
    const I codes = field<kFrom * kBits, kPairMask<kBits>>(x);
    for (int m = 0; m < kRows; m++) acc[0][m] = dot2(acc[0][m], codes, iload(weights[m][tile][half][0]));
    vector_step<kBits, kRaw, kRows, kFrom + 1, kTo>(bytes, weights, tile, half, acc + 1);
  }
}

// out[m] = out[m] * decay[m] + unit[m] * (weights x codes), `out` in lane order, rows `out_stride` floats apart.
template <int kBits, Raw16 kRaw, int kRows>
void chunk_values(const uint8_t* const* tiles, int num_tiles, int offset, const ValueMap& map, const Weights* weights,
                  const float* decay, const float* unit, float* out, int64_t out_stride) {
  constexpr int kCount = kBits == 16 ? 1 : 16 / kBits, kPass = kCount < 4 ? kCount : 4;
  const auto pass = [&]<int kFrom>(int at) {
    std::conditional_t<kBits == 16, F, I> acc[kPass][kRows];
    for (auto& f : acc)
      for (auto& x : f)
        if constexpr (kBits == 16) x = fzero();
        else x = izero();
    for (int t = 0; t < num_tiles; t++)
      for (int half = 0; half < map.halves; half++)
        vector_step<kBits, kRaw, kRows, kFrom, kFrom + kPass>(tiles[t] + offset + at + half * map.half_bytes, weights, t,
                                                              half, acc);
    for (int f = 0; f < kPass; f++)
      for (int m = 0; m < kRows; m++) {
        float* o = out + m * out_stride + 16 * f;
        F sum;
        if constexpr (kBits == 16) sum = acc[f][m];
        else sum = to_float(acc[f][m]);
        fstore(o, fma(fload(o), fset(decay[m]), mul(sum, fset(unit[m]))));
      }
    out += 16 * kPass;
  };
  for (int plane = 0; plane < map.planes; plane++)
    for (int v = 0; v < map.vectors; v++) {
      const int at = plane * 2 * map.half_bytes + 64 * v;
      pass.template operator()<0>(at);
      if constexpr (kCount > 4) pass.template operator()<4>(at);
    }
}

// Channel of every accumulator lane, in lane order.
inline void lane_channels(const Page& page, const ValueMap& map, int16_t* channel) {
  const int width = page.value_width(), groups = page.value_groups();
  const int fields = page.value_bits == 16 ? 1 : 16 / page.value_bits;
  for (int plane = 0; plane < map.planes; plane++)
    for (int v = 0; v < map.vectors; v++)
      for (int f = 0; f < fields; f++)
        for (int lane = 0; lane < 16; lane++) {
          const int word_at = (16 * v + lane) % (groups * 4 * width);
          const int group = word_at / (4 * width), column = word_at % width;
          *channel++ = (int16_t)(((group * map.planes + plane) * width + column) * fields + f);
        }
}

}  // namespace jettison::JETTISON_TIER
