// One warp, 32 tokens, all columns of an item: scores, online softmax, weighted values, in registers.
#pragma once
#include "step_data.cuh"

namespace jt {

template <class S>
struct Attend {
  using P = typename S::P;
  using K = typename S::K;
  using V = typename S::V;
  static constexpr int D = S::D, KB = S::KB, VB = S::VB, NT = S::NT, SUB = S::SUB, COLS = S::COLS;

  float o[NT][D / 16][4];        // [tile of columns][pair of channels][channel 2 * i + e / 2, column 2 * t + e % 2]
  float m[COLS], l[COLS], z[COLS];  // maximum in log2 units (-inf: none yet), sum of p, sum of p * value zero
  u32 q[NT][D / 8];              // query fragments
  float total[COLS];             // sum of the query's channels, in log2 units of the score
  bool pending;                  // some column has no maximum yet

  using Data = StepData<S>;

  static JT_DEVICE int column(int c) { return S::PAIR ? 2 * (quarter() & 1) + c : 8 * (c / 2) + 2 * quarter() + (c & 1); }

  JT_DEVICE void begin(const AttentionArgs& a) {
    load_query();
#pragma unroll
    for (int c = 0; c < COLS; c++) {
      total[c] *= a.scale * kLog2E;
      m[c] = -infinity(), l[c] = z[c] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < D / 16; i++) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.f;
    pending = true;
  }

  // The codes' powers of two are folded in; the sum is taken over the rounded query, so that zeros cancel exactly.
  JT_DEVICE void load_query() {
    const int g = lane_group(), t = quarter();
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int c = S::PAIR ? g & 3 : 8 * n + g;
      float sum = 0.f;
      int i = 0;
#pragma unroll
      for (int w = 0; w < K::words; w++)
#pragma unroll
        for (int j = 0; j < K::registers(w); j++, i++) {
          const float low = *S::query(c, K::channel(t, w, j, 0)), high = *S::query(c, K::channel(t, w, j, 1));
          if constexpr (KB == 16) {
            q[n][i] = S::BF16 ? bfloat2(low, high) : half2(low, high);
          } else {
            const float up = (float)(1 << 4) / (float)(1 << exponent<KB>(j)), down = 1.f / up;
            q[n][i] = half2(low * up, high * up);
            sum = fused(half_value(q[n][i]), down, sum);
            sum = fused(half_value(q[n][i] >> 16), down, sum);
          }
        }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      total[2 * n] = shuffle(sum, 8 * (S::PAIR ? t & 1 : t));
      total[2 * n + 1] = shuffle(sum, 8 * (S::PAIR ? t & 1 : t) + 4);
    }
  }

  // s[u][n][e] = query . codes of tile u; e: token g + 8 * (e / 2), column 8 * n + 2 * t + e % 2
  JT_DEVICE void multiply_keys(const Data& data, float (&s)[2][NT][4]) const {
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
      for (int n = 0; n < NT; n++) s[u][n][0] = s[u][n][1] = s[u][n][2] = s[u][n][3] = 0.f;
      if constexpr (KB == 16) {
        const auto& k = data.k[u];
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
          for (int n = 0; n < NT; n++)
            mma<S::BF16>(s[u][n], k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1], q[n][2 * i], q[n][2 * i + 1]);
      } else {
        int i = 0;
#pragma unroll
        for (int w = 0; w < K::words; w++) {
          u32 x[K::per_word], y[K::per_word];
          unpack<KB>(data.k[u][0][w], x);
          unpack<KB>(data.k[u][1][w], y);
#pragma unroll
          for (int j = 0; j < K::registers(w); j += 2, i += 2)
#pragma unroll
            for (int n = 0; n < NT; n++) mma<false>(s[u][n], x[j], y[j], x[j + 1], y[j + 1], q[n][i], q[n][i + 1]);
        }
      }
    }
  }

  static JT_DEVICE void multiply_values(const u32 (&v)[2][V::words], u32 b0, u32 b1, float (&o)[D / 16][4]) {
    if constexpr (VB == 16) {
#pragma unroll
      for (int i = 0; i < D / 16; i++) mma<S::BF16>(o[i], v[0][2 * i], v[0][2 * i + 1], v[1][2 * i], v[1][2 * i + 1], b0, b1);
    } else {
      int i = 0;
#pragma unroll
      for (int w = 0; w < V::words; w++) {
        u32 x[V::per_word], y[V::per_word];
        unpack<VB>(v[0][w], x);
        unpack<VB>(v[1][w], y);
#pragma unroll
        for (int j = 0; j < V::registers(w); j += 2, i++) mma<false>(o[i], x[j], x[j + 1], y[j], y[j + 1], b0, b1);
      }
    }
  }

  // limit * tanh(x / limit), both in log2 units of the score
  static JT_DEVICE float cap(float x, float limit) {
    return limit - 2.f * limit / (1.f + exp2_fast(x / limit * (2.f * kLog2E)));
  }

  // Scores in log2 units minus the running maximum (0 while a column has none).
  JT_DEVICE void scale_scores(float (&v)[SUB][NT][4], const Data& data, const AttentionArgs& a) const {
    const float factor = a.scale * kLog2E, limit = a.softcap * kLog2E;
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int c = 2 * n + (e & 1), r = e >> 1;
          const float base = m[c] == -infinity() ? 0.f : m[c];
          if constexpr (KB == 16) {
            const float x = v[u][n][e] * factor;
            v[u][n][e] = (S::CAP ? cap(x, limit) : x) - base;
          } else if constexpr (S::CAP) {
            const float scale = half_value(data.key_scale[u][r]) * (factor * 1048576.f), zero = half_value(data.key_scale[u][r] >> 16);
            v[u][n][e] = cap(fused(v[u][n][e], scale, zero * total[c]), limit) - base;
          } else {
            const float scale = half_value(data.key_scale[u][r]) * (factor * 1048576.f), zero = half_value(data.key_scale[u][r] >> 16);
            v[u][n][e] = fused(v[u][n][e], scale, fused(zero, total[c], -base));
          }
        }
  }

  JT_DEVICE void hide(float (&v)[SUB][NT][4], i32 token, const AttentionArgs& a, const Entry& e) const {
#pragma unroll
    for (int c = 0; c < COLS; c++) {
      const Column col = column_of<S::NC>(a, e, column(c));
      const i32 from = larger(S::SINKS, col.from);
#pragma unroll
      for (int u = 0; u < SUB; u++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const i32 at = token + 16 * (S::PAIR ? quarter() >> 1 : u) + lane_group() + 8 * r;
          if (at < from || at >= col.to) v[u][c / 2][2 * r + (c & 1)] = -infinity();
        }
    }
  }

  JT_DEVICE void rescale(float (&v)[SUB][NT][4]) {
    bool unset = false;
#pragma unroll
    for (int c = 0; c < COLS; c++) {
      const int n = c / 2, b = c & 1;
      float top = -infinity();
#pragma unroll
      for (int u = 0; u < SUB; u++) top = larger(top, larger(v[u][n][b], v[u][n][b + 2]));
#pragma unroll
      for (int x = 4; x < 32; x *= 2) top = larger(top, shuffle_xor(top, x));
      const bool first = m[c] == -infinity();
      const float move = first ? (top == -infinity() ? 0.f : top) : larger(top, 0.f);
      const float f = first ? 1.f : exp2_fast(-move);
      if (!first || top != -infinity()) m[c] = (first ? 0.f : m[c]) + move;
      unset |= m[c] == -infinity();
      l[c] *= f, z[c] *= f;
#pragma unroll
      for (int i = 0; i < D / 16; i++) o[n][i][b] *= f, o[n][i][b + 2] *= f;
#pragma unroll
      for (int u = 0; u < SUB; u++) v[u][n][b] -= move, v[u][n][b + 2] -= move;
    }
    pending = any(unset);
  }

  // The scores of 32 tokens, as `scale_scores` leaves them.
  JT_DEVICE void score(float (&v)[SUB][NT][4], const Data& data, i32 token, bool edge, const AttentionArgs& a, const Piece& piece) const {
    float s[2][NT][4];
    multiply_keys(data, s);
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) v[u][n][e] = S::PAIR && quarter() >= 2 ? s[1][n][e] : s[u][n][e];
    scale_scores(v, data, a);
    if (edge) hide(v, token, a, piece.e);
  }

  JT_DEVICE void add_values(const float (&v)[SUB][NT][4], const Data& data) {
    const int g = lane_group();
#pragma unroll
    for (int n = 0; n < NT; n++) {
      u32 b[SUB][2];
#pragma unroll
      for (int u = 0; u < SUB; u++) {
        float p[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int c = 2 * n + (e & 1);
          p[e] = exp2_fast(v[u][n][e]);
          l[c] += p[e];
          if constexpr (VB < 16) {
            z[c] = fused(p[e], half_value(data.value_scale[u][e >> 1] >> 16), z[c]);
            p[e] *= half_value(data.value_scale[u][e >> 1]);
          }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
          b[u][r] = transpose(VB == 16 && S::BF16 ? bfloat2(p[2 * r], p[2 * r + 1]) : half2(p[2 * r], p[2 * r + 1]));
      }
      const bool low = !S::PAIR || g < 4, high = !S::PAIR || g >= 4;
      multiply_values(data.v[0], low ? b[0][0] : 0u, low ? b[0][1] : 0u, o[n]);
      multiply_values(data.v[1], high ? b[SUB - 1][0] : 0u, high ? b[SUB - 1][1] : 0u, o[n]);
    }
  }

  // Add the 32 tokens from `token` on; `edge` if some column does not see all of them. The values are read from `slot`
  // late: registers are short.
  JT_DEVICE void step(const u8* slot, i32 token, bool edge, const AttentionArgs& a, const Piece& piece) {
    Data data;
    float v[SUB][NT][4], top = -infinity();
    data.load_keys(slot);
    data.load_scales(slot);
    if (edge) data.clear_scales(token, piece.readable, piece.e.len);
    score(v, data, token, edge, a, piece);
#pragma unroll
    for (int x = 0; x < SUB * NT * 4; x++) top = larger(top, v[x / (4 * NT)][x / 4 % NT][x % 4]);
    // Lazily: powers up to 2^8 do no harm.
    if (any(top > 8.f) || pending) rescale(v);
    data.load_values(slot);
    if (edge) data.clear_values(token, piece.readable, piece.e.len);
    add_values(v, data);
  }

  // Sum over the lanes; a pair of column sets becomes one, held twice.
  JT_DEVICE void settle() {
#pragma unroll
    for (int c = 0; c < COLS; c++) {
#pragma unroll
      for (int x = 4; x < 32; x *= 2) l[c] += shuffle_xor(l[c], x), z[c] += shuffle_xor(z[c], x);
      if constexpr (S::PAIR) {
        const float top = larger(m[c], shuffle_xor(m[c], 2)), f = m[c] == -infinity() ? 0.f : exp2_fast(m[c] - top);
        m[c] = top;
        l[c] *= f, z[c] *= f;
        l[c] += shuffle_xor(l[c], 2), z[c] += shuffle_xor(z[c], 2);
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
          for (int e = c; e < 4; e += 2) {
            o[0][i][e] *= f;
            o[0][i][e] += shuffle_xor(o[0][i][e], 2);
          }
      }
    }
  }

  JT_DEVICE void write_part() const {
    const int warp = thread() >> 5, g = lane_group(), t = quarter();
#pragma unroll
    for (int c = 0; c < COLS; c++) {
      const int n = c / 2, b = c & 1;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        const float up = VB == 16 ? 1.f : (float)(1 << (24 - V::exponent_of(i)));
        const float x = fused(o[n][i / 2][b + 2 * (i & 1)], up, z[c]);
        if (!S::PAIR || t >> 1 == (i & 1)) *S::sum(warp, column(c), g, i) = x;
      }
      if (g == 0 && (!S::PAIR || t < 2)) S::moments(warp, column(c))[0] = m[c], S::moments(warp, column(c))[1] = l[c];
    }
  }
};

}  // namespace jt
