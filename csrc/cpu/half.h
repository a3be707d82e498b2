// Scalar conversions between float and the 16-bit formats, without processor support.
#pragma once
#include <cstdint>
#include <cstring>

namespace jettison {

// Internal linkage: every tier compiles its own copy with its own instruction set.
static inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float half_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Shifting into float's exponent and multiplying by 2^112 handles denormals too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u)));
}

// Round to nearest even.
static inline uint16_t float_half(float f) {
  const uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000u) {  // denormal result: let the FPU round at the right position
    const float shifted = bits_float(a) + 0.5f;
    return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = a - 0x38000000u + 0xfff + (a >> 13 & 1);
  return (uint16_t)(sign | rounded >> 13);
}
// Toward -inf (up = false) or +inf (up = true).
static inline uint16_t float_half_directed(float f, bool up) {
  uint16_t h = float_half(f);
  const float back = half_float(h);
  if (up ? !(back < f) : !(back > f)) return h;
  if ((h & 0x7fff) == 0) return up ? 0x0001 : 0x8001;
  const bool away = up != (bool)(h & 0x8000);
  return (uint16_t)(away ? h + 1 : h - 1);
}

static inline uint16_t float_bf16(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace jettison
