// Sixteen-lane primitives, AVX-512 (F, BW, DQ, VL, VNNI).
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "lanes.h"

namespace jettison::JETTISON_TIER {

using I = __m512i;  // 16 x int32
using F = __m512;   // 16 x float

inline I izero() { return _mm512_setzero_si512(); }
inline F fzero() { return _mm512_setzero_ps(); }
inline F fset(float x) { return _mm512_set1_ps(x); }
inline I iload(const void* p) { return _mm512_loadu_si512(p); }
inline F fload(const float* p) { return _mm512_loadu_ps(p); }
inline void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
inline void fstore(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline float hmax(F x) { return _mm512_reduce_max_ps(x); }
inline float hsum(F x) { return _mm512_reduce_add_ps(x); }

// acc += a.lo16 * b.lo16 + a.hi16 * b.hi16, signed, per 32-bit lane
inline I dot2(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }

template <int kShift, uint32_t kMask>
inline I field(I x) {
  if constexpr (kShift) x = _mm512_srli_epi32(x, kShift);
  return _mm512_and_si512(x, _mm512_set1_epi32(kMask));
}

// 16-bit floats in the low or high half of each lane
inline F bf16_low(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline F bf16_high(I x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }
inline F fp16_low(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline F fp16_high(I x) { return fp16_low(_mm512_srli_epi32(x, 16)); }

// 16 contiguous elements to float and back (round to nearest even)
inline F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

inline I bcast4(const int32_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
inline F bcast4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

// Four rows of `n` (1..16) bytes, one per 128-bit lane, zero filled.
inline I load_rows(const uint8_t* p, int64_t stride, int n) {
  const __mmask16 m = (__mmask16)((1u << n) - 1);
  I x = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(m, p));
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(m, p + stride), 1);
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(m, p + 2 * stride), 2);
  return _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(m, p + 3 * stride), 3);
}
// Four contiguous rows of 32 bytes: column c of 16 bytes of each row.
inline void load_rows32(const uint8_t* p, I* column) {
  const I a = iload(p), b = iload(p + 64);
  column[0] = _mm512_shuffle_i64x2(a, b, 0x88);
  column[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
}
// Four contiguous rows of 64 bytes: columns `odd` and `odd + 2`.
inline void load_rows64(const uint8_t* p, int odd, I* column) {
  const I a = iload(p), b = iload(p + 64), c = iload(p + 128), d = iload(p + 192);
  const I ab = odd ? _mm512_shuffle_i64x2(a, b, 0xdd) : _mm512_shuffle_i64x2(a, b, 0x88);
  const I cd = odd ? _mm512_shuffle_i64x2(c, d, 0xdd) : _mm512_shuffle_i64x2(c, d, 0x88);
  column[0] = _mm512_shuffle_i64x2(ab, cd, 0x88);
  column[1] = _mm512_shuffle_i64x2(ab, cd, 0xdd);
}

// Quad a holds 4 partial sums (one 128-bit lane) of each of the tokens 4a..4a+3; the result holds token sums in order.
inline I reduce_quads(I a, I b, I c, I d) {
  const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const I abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), abcd);
}
inline F reduce_quads(F a, F b, F c, F d) {
  const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const I lo = _mm512_unpacklo_epi64(_mm512_castps_si512(ab), _mm512_castps_si512(cd));
  const I hi = _mm512_unpackhi_epi64(_mm512_castps_si512(ab), _mm512_castps_si512(cd));
  const F abcd = add(_mm512_castsi512_ps(lo), _mm512_castsi512_ps(hi));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), abcd);
}

// Scales and zeros of a tile's 16 tokens: the fp16 pair at `column` (0 or 1) of slots of `bytes` (4 or 8).
inline void load_meta(const uint8_t* p, int bytes, int column, F* scale, F* zero) {
  alignas(64) static const uint16_t kIndex[3][32] = {
      {0, 8, 16, 24, 32, 40, 48, 56, 4, 12, 20, 28, 36, 44, 52, 60, 1, 9, 17, 25, 33, 41, 49, 57, 5, 13, 21, 29, 37, 45, 53, 61},
      {2, 10, 18, 26, 34, 42, 50, 58, 6, 14, 22, 30, 38, 46, 54, 62, 3, 11, 19, 27, 35, 43, 51, 59, 7, 15, 23, 31, 39, 47, 55, 63},
      {0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30, 1, 5, 9, 13, 17, 21, 25, 29, 3, 7, 11, 15, 19, 23, 27, 31}};
  const I a = iload(p);
  const I x = bytes == 4 ? _mm512_permutexvar_epi16(iload(kIndex[2]), a)
                         : _mm512_permutex2var_epi16(a, iload(kIndex[column]), iload(p + 64));
  *scale = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
  *zero = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
}

inline F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

// Sixteen non-negative floats <= 32767 -> eight lanes of two int16 (tokens 2i, 2i+1), spread by `index`.
inline I pair_lanes(F x, const int32_t* index) {
  const __m256i pairs = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x));
  return _mm512_permutexvar_epi32(iload(index), _mm512_castsi256_si512(pairs));
}
// Lane i of the result is lane 2*index[i] + odd of x.
inline F spread(F x, const int32_t* index, int odd) {
  const I at = _mm512_add_epi32(_mm512_slli_epi32(iload(index), 1), _mm512_set1_epi32(odd));
  return _mm512_permutexvar_ps(at, x);
}

inline F exp2(F x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);
  const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = sub(x, n);
  F p = fset(1.3218672482e-3f);
  p = fma(p, f, fset(9.6716979384e-3f));
  p = fma(p, f, fset(5.5508929525e-2f));
  p = fma(p, f, fset(2.4022238003e-1f));
  p = fma(p, f, fset(6.9314685594e-1f));
  p = fma(p, f, fset(1.0f));
  return _mm512_scalef_ps(p, n);
}

}  // namespace jettison::JETTISON_TIER
