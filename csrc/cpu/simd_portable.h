// Sixteen-lane primitives in plain C++, for any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "lanes.h"

namespace jettison::JETTISON_TIER {

struct I {
  int32_t x[16];
};
struct F {
  float x[16];
};

template <class Op>
inline I each_i(Op op) {
  I r;
  for (int i = 0; i < 16; i++) r.x[i] = op(i);
  return r;
}
template <class Op>
inline F each_f(Op op) {
  F r;
  for (int i = 0; i < 16; i++) r.x[i] = op(i);
  return r;
}

inline I izero() { return I{}; }
inline F fzero() { return F{}; }
inline F fset(float v) { return each_f([&](int) { return v; }); }
inline I iload(const void* p) {
  I r;
  std::memcpy(r.x, p, 64);
  return r;
}
inline F fload(const float* p) {
  F r;
  std::memcpy(r.x, p, 64);
  return r;
}
inline void istore(void* p, I v) { std::memcpy(p, v.x, 64); }
inline void fstore(float* p, F v) { std::memcpy(p, v.x, 64); }
inline F add(F a, F b) { return each_f([&](int i) { return a.x[i] + b.x[i]; }); }
inline F sub(F a, F b) { return each_f([&](int i) { return a.x[i] - b.x[i]; }); }
inline F mul(F a, F b) { return each_f([&](int i) { return a.x[i] * b.x[i]; }); }
inline F div(F a, F b) { return each_f([&](int i) { return a.x[i] / b.x[i]; }); }
inline F fma(F a, F b, F c) { return each_f([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
inline F max(F a, F b) { return each_f([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }  // b if NaN
inline F to_float(I a) { return each_f([&](int i) { return (float)a.x[i]; }); }
inline float hmax(F a) {
  float m = a.x[0];
  for (float v : a.x) m = v > m ? v : m;
  return m;
}
inline float hsum(F a) {
  float s = 0;
  for (float v : a.x) s += v;
  return s;
}

inline I dot2(I acc, I a, I b) {
  return each_i([&](int i) {
    return acc.x[i] + (int16_t)a.x[i] * (int16_t)b.x[i] + (int16_t)(a.x[i] >> 16) * (int16_t)(b.x[i] >> 16);
  });
}
template <int kShift, uint32_t kMask>
inline I field(I a) {
  return each_i([&](int i) { return (int32_t)((uint32_t)a.x[i] >> kShift & kMask); });
}

inline F bf16_low(I a) { return each_f([&](int i) { return bits_float((uint32_t)a.x[i] << 16); }); }
inline F bf16_high(I a) { return each_f([&](int i) { return bits_float((uint32_t)a.x[i] & 0xffff0000u); }); }
inline F fp16_low(I a) { return each_f([&](int i) { return half_float((uint16_t)a.x[i]); }); }
inline F fp16_high(I a) { return each_f([&](int i) { return half_float((uint16_t)((uint32_t)a.x[i] >> 16)); }); }
inline F load_bf16(const uint16_t* p) { return each_f([&](int i) { return bits_float((uint32_t)p[i] << 16); }); }
inline F load_fp16(const uint16_t* p) { return each_f([&](int i) { return half_float(p[i]); }); }

inline I bcast4(const int32_t* p) { return each_i([&](int i) { return p[i % 4]; }); }
inline F bcast4(const float* p) { return each_f([&](int i) { return p[i % 4]; }); }

inline I load_rows(const uint8_t* p, int64_t stride, int n) {
  I r{};
  for (int i = 0; i < 4; i++) std::memcpy(r.x + 4 * i, p + i * stride, n);
  return r;
}
inline void load_rows32(const uint8_t* p, I* column) {
  for (int c = 0; c < 2; c++) column[c] = load_rows(p + 16 * c, 32, 16);
}
inline void load_rows64(const uint8_t* p, int odd, I* column) {
  for (int c = 0; c < 2; c++) column[c] = load_rows(p + 16 * odd + 32 * c, 64, 16);
}

template <class V>
inline V reduce_quads(V a, V b, V c, V d) {
  V r;
  const V quads[4] = {a, b, c, d};
  for (int i = 0; i < 16; i++) {
    const auto* q = quads[i / 4].x + 4 * (i % 4);
    r.x[i] = (q[0] + q[2]) + (q[1] + q[3]);
  }
  return r;
}

inline void load_meta(const uint8_t* p, int bytes, int column, F* scale, F* zero) {
  for (int r = 0; r < 16; r++) {
    uint16_t pair[2];
    std::memcpy(pair, p + (r % 8 * 2 + r / 8) * bytes + 4 * column, 4);
    scale->x[r] = half_float(pair[0]);
    zero->x[r] = half_float(pair[1]);
  }
}

inline F select(Mask m, F yes, F no) { return each_f([&](int i) { return m >> i & 1 ? yes.x[i] : no.x[i]; }); }

inline I pair_lanes(F a, const int32_t* index) {
  int32_t pairs[8];
  for (int i = 0; i < 8; i++) pairs[i] = (int32_t)std::nearbyintf(a.x[2 * i]) | (int32_t)std::nearbyintf(a.x[2 * i + 1]) << 16;
  return each_i([&](int i) { return pairs[index[i]]; });
}
inline F spread(F a, const int32_t* index, int odd) { return each_f([&](int i) { return a.x[2 * index[i] + odd]; }); }

inline F exp2(F a) {
  return each_f([&](int i) { return std::exp2(a.x[i]); });
}

}  // namespace jettison::JETTISON_TIER
