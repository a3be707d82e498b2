// Packed pages -> keys and values in the model's own coordinates: un-rotated, un-scaled, the centre added.
// One warp per token; prefill with history reads the result through ordinary FlashAttention.
#pragma once
#include "rows.cuh"

namespace jt {

struct UnpackArgs {
  const u8* cache;
  const i32* block_table;
  const i32* starts;      // first token of each sequence, or null
  const i32* cu_seqlens;  // [num_seqs + 1], where each sequence goes
  void* key;              // [tokens][heads][D], contiguous
  void* value;
  const float* key_center;
  const float* key_scale;
  i64 block_stride, head_stride;
  i32 table_stride, block_size, num_seqs, heads, tokens, reserved;
};

template <int D, int KB, int VB, int SINKS, bool ROTATE, Type T>
struct Unpack {
  using P = Page<D, KB, VB, SINKS>;
  using R = Row<D>;
  static constexpr int N = R::N, warps = 8, threads = 32 * warps, shared_bytes = 0;

  static JT_DEVICE void row(const UnpackArgs& a, const u8* page, i32 position, i32 offset, i32 head, int side, i64 to) {
    const int lane = thread() & 31, r = offset % 16, bits = side ? VB : KB;
    const u8* tile = page + (i64)(offset / 16) * P::tile;
    float x[N];
    if (bits == 16) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int d = i * 32 + lane;
        x[i] = load_element<T>(tile + (side ? P::value(r, d) : P::key(r, 2 * d)), 0);
      }
    } else {
      if (SINKS > 0 && position < SINKS) {
        const u16* area = reinterpret_cast<const u16*>(page + (i64)(a.block_size / 16) * P::tile) + (side * SINKS + position) * D;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = half_value(area[i * 32 + lane]);
      } else {
        const u32 meta = *reinterpret_cast<const u32*>(tile + P::scales(r) + (side ? P::key_meta : 0));
        const float scale = half_value(meta), zero = half_value(meta >> 16);
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int d = i * 32 + lane, at = d * bits;
          const u32 word = *reinterpret_cast<const u16*>(tile + (side ? P::value(r, at / 16) : P::key(r, at / 16 * 2)));
          x[i] = (float)(word >> at % 16 & ((1u << bits) - 1)) * scale + zero;
        }
      }
      if constexpr (ROTATE) R::rotate(x);
      if (!side) {
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int d = head * D + i * 32 + lane;
          if (a.key_scale) x[i] *= a.key_scale[d];
          if (a.key_center) x[i] += a.key_center[d];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++) store_element<T>(side ? a.value : a.key, to + i * 32 + lane, x[i]);
  }

  static JT_DEVICE void run(const UnpackArgs& a) {
    const i32 n = block() * warps + (thread() >> 5);
    if (n >= a.tokens) return;
    i32 low = 0, high = a.num_seqs - 1;
    while (low < high) {
      const i32 middle = (low + high + 1) / 2;
      if (a.cu_seqlens[middle] <= n)
        low = middle;
      else
        high = middle - 1;
    }
    const i32 position = n - a.cu_seqlens[low] + (a.starts ? a.starts[low] : 0), offset = position % a.block_size;
    const u8* block = a.cache + a.block_table[(i64)low * a.table_stride + position / a.block_size] * a.block_stride;
    for (i32 head = 0; head < a.heads; head++) {
      const i64 to = ((i64)n * a.heads + head) * D;
      row(a, block + head * a.head_stride, position, offset, head, 0, to);
      row(a, block + head * a.head_stride, position, offset, head, 1, to);
    }
  }
};

}  // namespace jt
