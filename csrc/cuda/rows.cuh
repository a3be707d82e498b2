// One row of D channels spread over a warp: lane holds channels lane, lane + 32, ...
#pragma once
#include "page.cuh"

namespace jt {

template <int D>
struct Row {
  static constexpr int N = D / 32, block = D & -D;
  static_assert(D % 32 == 0, "head sizes that are multiples of 32");

  // Orthonormal block Hadamard transform, its own inverse, rounding in the order of csrc/codec.py.
  static JT_DEVICE void rotate(float (&x)[N]) {
    const int lane = thread() & 31;
#pragma unroll
    for (int s = 1; s < block; s *= 2) {
      if (s < 32) {
#pragma unroll
        for (int i = 0; i < N; i++) {
          const float y = shuffle_xor(x[i], s);
          x[i] = lane & s ? y - x[i] : x[i] + y;
        }
      } else {
#pragma unroll
        for (int i = 0; i < N; i++)
          if (!(i & s / 32)) {
            const float a = x[i], b = x[i + s / 32];
            x[i] = a + b, x[i + s / 32] = a - b;
          }
      }
    }
    const float scale = block == 32 ? 0.17677669529663689f : block == 64 ? 0.125f : block == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = times(x[i], scale);
  }
};

// The same for attention: consecutive channels per lane where D is a power of two, so that loads are wide.
template <int D>
struct Lanes {
  static constexpr int N = D / 32;
  static constexpr bool wide = (D & (D - 1)) == 0;
  static JT_DEVICE int channel(int lane, int i) { return wide ? lane * N + i : i * 32 + lane; }
  static JT_DEVICE void rotate(float (&x)[N]) {
    if constexpr (!wide) return Row<D>::rotate(x);
    const int lane = thread() & 31;
#pragma unroll
    for (int s = 1; s < N; s *= 2)
#pragma unroll
      for (int i = 0; i < N; i++)
        if (!(i & s)) {
          const float a = x[i], b = x[i + s];
          x[i] = a + b, x[i + s] = a - b;
        }
#pragma unroll
    for (int s = 1; s < 32; s *= 2)
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float y = shuffle_xor(x[i], s);
        x[i] = lane & s ? y - x[i] : x[i] + y;
      }
    const float scale = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] *= scale;
  }
};

}  // namespace jt
