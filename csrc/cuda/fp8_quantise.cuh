// Rows to E4M3 codes with two levels of scales, bit for bit as csrc/fp8_format.py defines them. A warp takes a row, a
// lane eight neighbours at a time.
#pragma once
#include "primitives.cuh"

namespace jt {

struct QuantiseArgs {
  const void* x;      // [m, k], rows `stride` elements apart and 16-byte aligned
  u8* codes;          // [m, k]
  u8* exponents;      // [m, ceil(k / GROUP)]
  float* scale;       // [m] where rows have scales
  float* promotions;  // [ceil(k / GROUP), rows], the exponents as factors, for a product that promotes per group; or none
  i64 stride;
  i32 m, k, rows, reserved;
};

// GROUP: elements per exponent; ROW: whether a row has a scale above them.
template <int GROUP, bool ROW, Type T>
struct Quantise {
  static constexpr int warps = 8, threads = 32 * warps, shared_bytes = 0;
  static constexpr int lanes = GROUP / 8;  // that share a group
  static_assert(GROUP == 32 || GROUP == 128, "groups of 32 or 128");
  static constexpr float kMax = 448.f;

  static JT_DEVICE u32 magnitude(float x) { return as_bits(x) & 0x7fffffffu; }
  static JT_DEVICE float power_of_two(i32 e) { return as_float(e >= -126 ? (u32)(e + 127) << 23 : 1u << (e + 149)); }

  // Smallest float s >= 2^-126 with 448 s >= largest; 1 for 0.
  static JT_DEVICE float scale_for(float largest) {
    if (largest == 0.f) return 1.f;
    const float s = divide(largest, kMax);
    return larger(as_float(as_bits(s) + (fused(s, kMax, -largest) < 0.f)), as_float(1u << 23));
  }
  // Largest float that is at most 448 s.
  static JT_DEVICE float limit_of(float s) {
    const float r = times(s, kMax);
    if (r == infinity()) return as_float(0x7f7fffffu);
    return as_float(as_bits(r) - (fused(s, kMax, -r) < 0.f));
  }
  static JT_DEVICE i32 exponent_for(u32 largest, float scale) {
    if (largest == 0) return -127;
    const u32 limit = as_bits(limit_of(scale));
    const i32 e = (i32)(largest >> 23) - (i32)(limit >> 23) + ((largest & 0x7fffffu) > (limit & 0x7fffffu));
    return larger(e, larger(1 - (i32)(as_bits(scale) >> 23), -127));
  }

  // Eight elements of a row; beyond its end zeros.
  static JT_DEVICE void load(float (&x)[8], const QuantiseArgs& a, i64 row, i32 at) {
    if (at + 8 <= a.k) {
      if constexpr (T == Type::f32) {
        u32 w[8];
        load_words<8>(w, static_cast<const u8*>(a.x) + (row * a.stride + at) * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = as_float(w[i]);
      } else {
        u32 w[4];
        load_words<4>(w, static_cast<const u8*>(a.x) + (row * a.stride + at) * 2);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = T == Type::bf16 ? as_float(w[i / 2] >> 16 * (i & 1) << 16) : half_value(w[i / 2] >> 16 * (i & 1));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = at + i < a.k ? load_element<T>(a.x, row * a.stride + at + i) : 0.f;
    }
  }

  // Largest magnitude of the lane's group, as bits: 0x7f800000 and above for a group with a NaN or an infinity.
  static JT_DEVICE u32 largest_of(const float (&x)[8]) {
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) top = larger(top, magnitude(x[i]));
#pragma unroll
    for (int s = 1; s < lanes; s *= 2) top = larger(top, as_bits(shuffle_xor(as_float(top), s)));
    return top;
  }

  static JT_DEVICE float row_scale(const QuantiseArgs& a, i64 row) {
    const int lane = thread() & 31;
    u32 top = 0;
#pragma unroll 4
    for (i32 at = 8 * lane; at - 8 * lane < a.k; at += 256) {
      float x[8];
      load(x, a, row, at);
      const u32 here = largest_of(x);
      if (here < 0x7f800000u) top = larger(top, here);
    }
#pragma unroll
    for (int s = 1; s < 32; s *= 2) top = larger(top, as_bits(shuffle_xor(as_float(top), s)));
    return scale_for(as_float(top));
  }

  static JT_DEVICE void store(const QuantiseArgs& a, const float (&x)[8], i64 row, i32 at, float factor, bool lost) {
    u32 w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      w[i] = e4m3x2(x[4 * i] * factor, x[4 * i + 1] * factor) | e4m3x2(x[4 * i + 2] * factor, x[4 * i + 3] * factor) << 16;
      if (lost) w[i] = 0x7f7f7f7fu;
    }
    u8* to = a.codes + row * a.k + at;
    if (at + 8 <= a.k && a.k % 8 == 0) {
      struct alignas(8) Two {
        u32 x[2];
      };
      *reinterpret_cast<Two*>(to) = {w[0], w[1]};
    } else {
      for (int i = 0; i < 8 && at + i < a.k; i++) to[i] = (u8)(w[i / 4] >> 8 * (i & 3));
    }
  }

  static JT_DEVICE void run(const QuantiseArgs& a) {
    const int lane = thread() & 31;
    const i64 row = (i64)block() * warps + (thread() >> 5);
    if (row >= a.m) return;
    const i32 groups = (a.k + GROUP - 1) / GROUP;
    const float scale = ROW ? row_scale(a, row) : 1.f, inverse = divide(1.f, scale);
    if (ROW && lane == 0) a.scale[row] = scale;
#pragma unroll 4
    for (i32 at = 8 * lane; at - 8 * lane < a.k; at += 256) {
      float x[8];
      load(x, a, row, at);
      const u32 top = largest_of(x);
      const bool lost = top >= 0x7f800000u;
      const i32 e = exponent_for(lost ? 0u : top, scale);
      if (at < a.k) store(a, x, row, at, top == 0 ? 0.f : times(inverse, power_of_two(-e)), lost);
      if (lane % lanes == 0 && at < a.k) {
        const i32 group = at / GROUP;
        a.exponents[row * groups + group] = lost ? (u8)255 : (u8)(e + 127);
        if (a.promotions) a.promotions[(i64)group * a.rows + row] = lost ? as_float(0x7fc00000u) : power_of_two(e);
      }
    }
  }
};

}  // namespace jt
