// Online softmax of one row and chunk: scores to integer weights of the values.
#pragma once
#include "values.h"

namespace jettison::JETTISON_TIER {

constexpr float kLog2e = 1.44269504088896341f;

// What all rows of a chunk share.
struct Chunk {
  const uint8_t *tiles[kChunkTiles], *next_tiles[kChunkTiles];
  int num_tiles;
  int64_t first_token;
  const uint8_t* sinks;  // sink area if this chunk starts the sequence, else null
  alignas(64) float key_scale[kChunkTokens], key_zero[kChunkTokens];
  alignas(64) float value_scale[kChunkTokens], value_zero[kChunkTokens];
};

// Running state of one row within a segment. The scores' unit is log2.
struct RowState {
  float maximum, sum, zero_sum;  // zero_sum: weights x value zeros
};

struct RowMask {
  int from, to;  // visible tokens of the chunk
  bool partial;
};

inline F soft_cap(F s, float cap) {  // cap * tanh(s / cap), then to log2 units
  const F e = exp2(mul(s, fset(2 * kLog2e / cap)));
  const F tanh = sub(fset(1.f), div(fset(2.f), add(e, fset(1.f))));
  return mul(tanh, fset(cap * kLog2e));
}

inline float power(float x) { return x == -INFINITY ? 0.f : ::exp2f(x); }

// scores (in: 16 x num_tiles; out: weights before quantising) -> weights; returns the decay of earlier results and
// the unit of one integer weight.
template <bool kQuantised>
inline void softmax_row(const Chunk& chunk, const ValueMap& map, const RowMask& mask, float softcap, float* scores,
                        RowState* state, Weights* weights, float* first_tile, float* decay, float* unit) {
  F top = fset(-INFINITY);
  for (int t = 0; t < chunk.num_tiles; t++) {
    F s = fload(scores + 16 * t);
    if (softcap > 0) s = soft_cap(s, softcap);
    if (mask.partial) s = select(lanes(mask.from - 16 * t, mask.to - 16 * t), s, fset(-INFINITY));
    fstore(scores + 16 * t, s);
    top = max(top, s);
  }
  const float chunk_top = hmax(top), maximum = chunk_top > state->maximum ? chunk_top : state->maximum;
  const float base = maximum == -INFINITY ? 0.f : maximum;
  *decay = power(state->maximum - base);

  F sum = fzero(), zeros = fzero(), largest = fzero();
  for (int t = 0; t < chunk.num_tiles; t++) {
    F p = exp2(sub(fload(scores + 16 * t), fset(base)));
    const Mask visible = mask.partial ? lanes(mask.from - 16 * t, mask.to - 16 * t) : Mask(0xffff);
    if (mask.partial) p = select(visible, p, fzero());
    sum = add(sum, p);
    if (t == 0) fstore(first_tile, p);
    if constexpr (kQuantised) {
      F w = mul(p, fload(chunk.value_scale + 16 * t)), z = mul(p, fload(chunk.value_zero + 16 * t));
      if (mask.partial) w = select(visible, w, fzero()), z = select(visible, z, fzero());
      largest = max(largest, w);
      zeros = add(zeros, z);
      fstore(scores + 16 * t, w);
    } else {
      for (int half = 0; half < map.halves; half++)
        for (int odd = 0; odd < 2; odd++) fstore((float*)(*weights)[t][half][odd], spread(p, map.index[half], odd));
    }
  }
  state->maximum = maximum;
  state->sum = state->sum * *decay + hsum(sum);
  *unit = 1.f;
  if constexpr (kQuantised) {
    state->zero_sum = state->zero_sum * *decay + hsum(zeros);
    const float most = hmax(largest);
    *unit = most / kWeightMax;
    const F inverse = fset(integers_per_unit(most));
    for (int t = 0; t < chunk.num_tiles; t++) {
      const F w = mul(fload(scores + 16 * t), inverse);
      for (int half = 0; half < map.halves; half++) istore((*weights)[t][half][0], pair_lanes(w, map.index[half]));
    }
  }
}

}  // namespace jettison::JETTISON_TIER
