// Sixteen-lane primitives, AVX2 + FMA + F16C: two 256-bit halves.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace jettison::JETTISON_TIER {

struct I {
  __m256i a, b;
};
struct F {
  __m256 a, b;
};

inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F fset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I iload(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void istore(void* p, I x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
inline void fstore(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y if either is NaN
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline float hmax(F x) {
  float v[8];
  _mm256_storeu_ps(v, _mm256_max_ps(x.a, x.b));
  float m = v[0];
  for (float y : v) m = y > m ? y : m;
  return m;
}
inline float hsum(F x) {
  float v[8];
  _mm256_storeu_ps(v, _mm256_add_ps(x.a, x.b));
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

inline I dot2(I acc, I x, I y) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
template <int kShift, uint32_t kMask>
inline I field(I x) {
  if constexpr (kShift) x = {_mm256_srli_epi32(x.a, kShift), _mm256_srli_epi32(x.b, kShift)};
  const __m256i m = _mm256_set1_epi32((int)kMask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}

inline __m256 as_ps(__m256i x) { return _mm256_castsi256_ps(x); }
inline F bf16_low(I x) { return {as_ps(_mm256_slli_epi32(x.a, 16)), as_ps(_mm256_slli_epi32(x.b, 16))}; }
inline F bf16_high(I x) {
  const __m256i m = _mm256_set1_epi32((int)0xffff0000u);
  return {as_ps(_mm256_and_si256(x.a, m)), as_ps(_mm256_and_si256(x.b, m))};
}
inline __m256 low_halves(__m256i x) {  // the low fp16 of each 32-bit lane
  const __m256i kept = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
}
inline F fp16_low(I x) { return {low_halves(x.a), low_halves(x.b)}; }
inline F fp16_high(I x) { return {low_halves(_mm256_srli_epi32(x.a, 16)), low_halves(_mm256_srli_epi32(x.b, 16))}; }
inline __m256 widen_bf16(const uint16_t* p) {
  return as_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline F load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

inline I bcast4(const int32_t* p) {
  const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {x, x};
}
inline F bcast4(const float* p) {
  const __m256 x = _mm256_broadcast_ps((const __m128*)p);
  return {x, x};
}

inline __m128i load_row(const uint8_t* p, int n) {
  if (n == 16) return _mm_loadu_si128((const __m128i*)p);
  alignas(16) uint8_t bytes[16] = {};
  std::memcpy(bytes, p, n);
  return _mm_load_si128((const __m128i*)bytes);
}
inline I load_rows(const uint8_t* p, int64_t stride, int n) {
  return {_mm256_set_m128i(load_row(p + stride, n), load_row(p, n)),
          _mm256_set_m128i(load_row(p + 3 * stride, n), load_row(p + 2 * stride, n))};
}
inline void load_rows32(const uint8_t* p, I* column) {
  const I r = iload(p), s = iload(p + 64);
  column[0] = {_mm256_permute2x128_si256(r.a, r.b, 0x20), _mm256_permute2x128_si256(s.a, s.b, 0x20)};
  column[1] = {_mm256_permute2x128_si256(r.a, r.b, 0x31), _mm256_permute2x128_si256(s.a, s.b, 0x31)};
}
inline void load_rows64(const uint8_t* p, int odd, I* column) {
  for (int c = 0; c < 2; c++) column[c] = load_rows(p + 16 * odd + 32 * c, 64, 16);
}

// One half of reduce_quads: sums of tokens (i, i+1) of the quads a..d, quad-major after the final permute.
inline __m256i reduce_half(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
inline __m256 reduce_half(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d lo = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  const __m256d hi = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  return _mm256_add_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi));
}
template <class V>
inline V reduce_quads(V a, V b, V c, V d) {
  V r;
  r.a = reduce_half(a.a, b.a, c.a, d.a);  // lanes: token 0 of quads a-d, token 1 of quads a-d
  r.b = reduce_half(a.b, b.b, c.b, d.b);  // tokens 2 and 3
  int32_t x[16], y[16];
  std::memcpy(x, &r, 64);
  for (int i = 0; i < 16; i++) y[i] = x[i % 4 * 4 + i / 4];
  std::memcpy(&r, y, 64);
  return r;
}

inline void load_meta(const uint8_t* p, int bytes, int column, F* scale, F* zero) {
  alignas(32) uint16_t s[16], z[16];
  for (int r = 0; r < 16; r++) {
    std::memcpy(s + r, p + (r % 8 * 2 + r / 8) * bytes + 4 * column, 2);
    std::memcpy(z + r, p + (r % 8 * 2 + r / 8) * bytes + 4 * column + 2, 2);
  }
  *scale = load_fp16(s);
  *zero = load_fp16(z);
}

inline __m256 mask_lanes(uint32_t m) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return as_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)m), bit), bit));
}
inline F select(Mask m, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, mask_lanes(m)), _mm256_blendv_ps(no.b, yes.b, mask_lanes(m >> 8))};
}

inline I gather_lanes(__m256i x, const int32_t* index) {  // index 0..7
  return {_mm256_permutevar8x32_epi32(x, _mm256_loadu_si256((const __m256i*)index)),
          _mm256_permutevar8x32_epi32(x, _mm256_loadu_si256((const __m256i*)index + 1))};
}
inline I pair_lanes(F x, const int32_t* index) {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  return gather_lanes(_mm256_permute4x64_epi64(packed, 0xd8), index);
}
inline F spread(F x, const int32_t* index, int odd) {
  const __m256 even_odd = odd ? _mm256_shuffle_ps(x.a, x.b, 0xdd) : _mm256_shuffle_ps(x.a, x.b, 0x88);
  const I r = gather_lanes(_mm256_permute4x64_epi64(_mm256_castps_si256(even_odd), 0xd8), index);
  return {as_ps(r.a), as_ps(r.b)};
}

inline __m256 exp2_half(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-126.f), x);
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(1.3218672482e-3f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6716979384e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5508929525e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022238003e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314685594e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, as_ps(power));
}
inline F exp2(F x) { return {exp2_half(x.a), exp2_half(x.b)}; }

}  // namespace jettison::JETTISON_TIER
