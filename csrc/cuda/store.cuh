// Quantise, rotate and pack new keys and values into their pages: one warp per token, head and side, in one pass.
// Codes, scales and zeros are bit for bit those of csrc/codec.py. Tokens share no byte, so nothing is atomic.
#pragma once
#include "rows.cuh"

namespace jt {

struct StoreArgs {
  const void* key;
  const void* value;
  u8* cache;
  const i64* slots;
  const float* key_center;
  const float* key_scale;
  i64 block_stride, head_stride;                                    // bytes
  i64 key_stride, key_head_stride, value_stride, value_head_stride;  // elements
  i32 tokens, heads, block_size, reserved;
};

template <int D, int KB, int VB, int SINKS, bool ROTATE, Type T>
struct Store {
  using P = Page<D, KB, VB, SINKS>;
  using R = Row<D>;
  static constexpr int N = R::N, warps = 8, threads = 32 * warps, shared_bytes = warps * D * 2;

  static JT_DEVICE u32 quantise(const float (&x)[N], int bits, u16* codes) {
    const int lane = thread() & 31;
    const float levels = (float)((1 << bits) - 1);
    float low = x[0], high = x[0];
    bool bad = false;
#pragma unroll
    for (int i = 0; i < N; i++) {
      low = smaller(low, x[i]), high = larger(high, x[i]);
      bad |= (as_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    }
#pragma unroll
    for (int s = 1; s < 32; s *= 2) {
      low = smaller(low, shuffle_xor(low, s));
      high = larger(high, shuffle_xor(high, s));
    }
    if (ROTATE && bits == 2) {  // codec.range_share
      const float cut = times(high - low, 0.125f);
      low = low + cut, high = high - cut;
    }
    const u32 zero = half_down(low), scale = half_up(divide(high - half_value(zero), levels));
    bad = any(bad) || (zero & 0x7c00u) == 0x7c00u || (scale & 0x7c00u) == 0x7c00u;
    const float step = half_value(scale), inverse = step > 0.f ? divide(1.f, step) : 0.f, base = half_value(zero);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float c = round_even((x[i] - base) * inverse);
      codes[i * 32 + lane] = bad ? (u16)0 : (u16)(int)smaller(larger(c, 0.f), levels);
    }
    return bad ? 0x7e007e00u : scale | zero << 16;
  }

  template <int B>
  static JT_DEVICE u16 granule(const u16* codes, int word) {
    if constexpr (B == 16) return codes[word];
    u32 x = 0;
#pragma unroll
    for (int k = 0; k < 16 / B; k++) x |= (u32)codes[word * (16 / B) + k] << k * B;
    return (u16)x;
  }

  static JT_DEVICE void run(const StoreArgs& a) {
    const int warp = thread() >> 5, lane = thread() & 31;
    const i64 task = (i64)block() * warps + warp;
    const i32 side = (i32)(task & 1), head = (i32)(task / 2 % a.heads);
    const i64 token = task / 2 / a.heads;
    if (token >= a.tokens) return;
    const i64 slot = a.slots[token];
    if (slot < 0) return;
    u8* page = a.cache + slot / a.block_size * a.block_stride + head * a.head_stride;
    const i32 offset = (i32)(slot % a.block_size), r = offset % 16;
    u8* tile = page + (i64)(offset / 16) * P::tile;
    u16* codes = reinterpret_cast<u16*>(shared_memory()) + warp * D;

    const void* from = side ? a.value : a.key;
    const i64 first = side ? token * a.value_stride + head * a.value_head_stride : token * a.key_stride + head * a.key_head_stride;
    const int bits = side ? VB : KB;
    float x[N], raw[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      raw[i] = x[i] = load_element<T>(from, first + d);
      if (!side && a.key_center) x[i] = x[i] - a.key_center[head * D + d];
      if (!side && a.key_scale) x[i] = times(x[i], divide(1.f, a.key_scale[head * D + d]));
    }
    if constexpr (ROTATE) R::rotate(x);
    u32 meta = 0;
    if (bits == 16) {
#pragma unroll
      for (int i = 0; i < N; i++) codes[i * 32 + lane] = element16<T == Type::f16 ? Type::f16 : Type::bf16>(raw[i]);
    } else {
      meta = quantise(x, bits, codes);
    }
    sync_warp();
    if (side) {
      for (int w = lane; w < P::words; w += 32) *reinterpret_cast<u16*>(tile + P::value(r, w)) = granule<VB>(codes, w);
      if (VB < 16 && lane == 0) *reinterpret_cast<u32*>(tile + P::scales(r) + P::key_meta) = meta;
    } else {
      for (int w = lane; w < D * KB / 16; w += 32) *reinterpret_cast<u16*>(tile + P::key(r, 2 * w)) = granule<KB>(codes, w);
      if (KB < 16 && lane == 0) *reinterpret_cast<u32*>(tile + P::scales(r)) = meta;
    }
    if (SINKS > 0 && offset < SINKS) {
      u16* area = reinterpret_cast<u16*>(page + (i64)(a.block_size / 16) * P::tile) + (side * SINKS + offset) * D;
#pragma unroll
      for (int i = 0; i < N; i++) area[i * 32 + lane] = element16<Type::f16>(x[i]);
    }
  }
};

}  // namespace jt
