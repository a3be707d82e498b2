// From the parts of a block's warps to an output row, or to a partial result that the item's last block merges.
// Each warp takes whole columns: lane `lane` holds channels Lanes<D>::channel(lane, 0 .. D / 32 - 1).
#pragma once
#include "attend.cuh"

namespace jt {

template <class S>
struct Merge {
  using L = Lanes<S::D>;
  static constexpr int N = L::N, D = S::D, NC = S::NC, W = S::W;
  const AttentionArgs& a;
  const Piece& piece;

  static JT_DEVICE float weight(float m, float top) { return m == -infinity() ? 0.f : exp2_fast(m - top); }

  // The piece's query rows on their way: each warp loads whole rows.
  struct Rows {
    static constexpr int count = (NC + W - 1) / W;
    float x[count][N];
  };
  JT_DEVICE void fetch_query(Rows& rows) const {
#pragma unroll
    for (int k = 0; k < Rows::count; k++) {
      const int c = (thread() >> 5) + k * W, lane = thread() & 31;
      const Column col = column_of<NC>(a, piece.e, c);
      const i64 row = col.token * a.query_stride + (i64)col.head * a.query_head_stride;
#pragma unroll
      for (int i = 0; i < N; i++)
        rows.x[k][i] = c >= NC || col.token < 0 ? 0.f : load_element<S::T>(a.query, row + L::channel(lane, i));
    }
  }
  // Into shared memory, scaled and rotated as the keys are.
  JT_DEVICE void put_query(Rows& rows) const {
#pragma unroll
    for (int k = 0; k < Rows::count; k++) {
      const int c = (thread() >> 5) + k * W, lane = thread() & 31;
      if (c >= NC) break;
      float(&x)[N] = rows.x[k];
      if constexpr (S::KB < 16)
        if (a.key_scale) {
#pragma unroll
          for (int i = 0; i < N; i++) x[i] *= a.key_scale[piece.e.head * D + L::channel(lane, i)];
        }
      if constexpr (S::KB < 16 && S::ROTATE) L::rotate(x);
#pragma unroll
      for (int i = 0; i < N; i++) *S::query(c, L::channel(lane, i)) = x[i];
    }
  }

  // The 16-bit copies of the sequence's first tokens, as one more part.
  JT_DEVICE void attend_sinks() const {
    if constexpr (S::SINKS == 0) return;
    const int warp = thread() >> 5, lane = thread() & 31;
    const Entry& e = piece.e;
    const bool here = e.first == 0 && e.begin == 0;
    const u8* page = a.cache + e.head * a.head_stride + (here ? (i64)a.block_table[(i64)e.seq * a.table_stride] * a.block_stride : 0);
    const u8* area = page + (i64)a.page_tiles * S::P::tile;
    for (int c = warp; c < NC; c += W) {
      const Column col = column_of<NC>(a, e, c);
      float m = -infinity(), l = 0.f, x[N];
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = 0.f;
      for (int j = col.from; here && j < smaller(S::SINKS, col.to); j++) {
        float s = 0.f;
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int d = L::channel(lane, i);
          const float key = S::KB < 16 ? load_element<Type::f16>(area, j * D + d) : load_element<S::T>(page + S::P::key(j, 2 * d), 0);
          s = fused(*S::query(c, d), key, s);
        }
#pragma unroll
        for (int w = 1; w < 32; w *= 2) s += shuffle_xor(s, w);
        s *= a.scale * kLog2E;
        if constexpr (S::CAP) s = Attend<S>::cap(s, a.softcap * kLog2E);
        const float top = larger(m, s), f = weight(m, top), p = exp2_fast(s - top);
        m = top, l = l * f + p;
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int d = L::channel(lane, i);
          const float value = S::VB < 16 ? load_element<Type::f16>(area, (S::SINKS + j) * D + d) : load_element<S::T>(page + S::P::value(j, d), 0);
          x[i] = x[i] * f + p * value;
        }
      }
      put(W, c, x);
      if (lane == 0) S::moments(W, c)[0] = m, S::moments(W, c)[1] = l;
    }
  }
  static JT_DEVICE void put(int part, int c, const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      int g, r;
      S::place(thread() & 31, i, g, r);
      *S::sum(part, c, g, r) = x[i];
    }
  }

  JT_DEVICE void finish(int c, float (&x)[N], float m, float l) const {
    const Column col = column_of<NC>(a, piece.e, c);
    float f = 1.f;
    if (a.head_sinks && col.token >= 0) {
      const float sink = a.head_sinks[col.head] * kLog2E, top = larger(m, sink);
      f = weight(m, top);
      l = l * f + exp2_fast(sink - top);
    }
    f = l == 0.f ? 0.f : divide(f, l);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] *= f;
    if constexpr (S::VB < 16 && S::ROTATE) L::rotate(x);
    if (col.token < 0) return;
    const i64 row = col.token * a.output_stride + (i64)col.head * a.output_head_stride;
#pragma unroll
    for (int i = 0; i < N; i++) store_element<S::T>(a.output, row + L::channel(thread() & 31, i), x[i]);
  }

  // All parts are in shared memory.
  JT_DEVICE void combine() const {
    const int warp = thread() >> 5, lane = thread() & 31;
    const bool whole = piece.whole();
    const i64 slot = 2 * block() + (piece.opens ? 0 : 1);
    for (int c = warp; c < NC; c += W) {
      float top = -infinity(), l = 0.f, x[N];
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = 0.f;
#pragma unroll
      for (int p = 0; p < S::parts; p++) top = larger(top, S::moments(p, c)[0]);
#pragma unroll
      for (int p = 0; p < S::parts; p++) {
        const float f = weight(S::moments(p, c)[0], top);
        l += f * S::moments(p, c)[1];
#pragma unroll
        for (int i = 0; i < N; i++) {
          int g, r;
          S::place(lane, i, g, r);
          x[i] += f * *S::sum(p, c, g, r);
        }
      }
      if (whole) {
        finish(c, x, top, l);
      } else {
        const i64 row = slot * NC + c;
#pragma unroll
        for (int i = 0; i < N; i++) a.partial[row * D + i * 32 + lane] = x[i];
        if (lane == 0) a.moments[2 * row] = top, a.moments[2 * row + 1] = l;
      }
    }
  }

  // What the block left in global memory of items that others work on too, its opening and its closing piece: the block
  // that comes last to an item merges it. Done once, at the end, so that no block waits for memory between pieces.
  static JT_DEVICE void close(const AttentionArgs& a, const Piece& opening, const Piece& closing) {
    const bool shares[2] = {!opening.whole(), !closing.opens && !closing.whole()};
    if (!shares[0] && !shares[1]) return;
    publish();
    sync_block();
    if (thread() < 2 && shares[thread()]) Merge{a, thread() ? closing : opening}.arrive(S::note(thread()));
    sync_block();
    publish();
#pragma unroll 1
    for (int x = thread() >> 5; x < 2 * NC; x += W) {
      const int i = x / NC;
      if (shares[i] && S::note(i)[0]) Merge{a, i ? closing : opening}.merge(x - i * NC, S::note(i));
    }
  }
  // note: am I the last; first and last block of the item; the first one's slot
  JT_DEVICE void arrive(i32* note) const {
    const Header& h = *a.header;
    const i64 item = (i64)((u64)piece.e.start_high << 32 | piece.e.start_low), start = item + h.item_cost;
    const i32 first = h.owner(start), last = h.owner(start + piece.e.steps - 1);
    note[0] = count_up(a.counters + first, last - first) == (u32)(last - first);
    note[1] = first, note[2] = last;
    note[3] = 2 * first + (h.range(first) >= item ? 0 : 1);
  }
  JT_DEVICE void merge(int c, const i32* note) const {
    const int lane = thread() & 31;
    const i32 first = note[1], last = note[2], opening = note[3];
    float top = -infinity(), l = 0.f, x[N];
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = 0.f;
    for (i32 b = first + lane; b <= last; b += 32) top = larger(top, load_fresh(a.moments + 2 * ((i64)(b == first ? opening : 2 * b) * NC + c)));
#pragma unroll
    for (int s = 1; s < 32; s *= 2) top = larger(top, shuffle_xor(top, s));
#pragma unroll 4
    for (i32 b = first; b <= last; b++) {
      const i64 row = (i64)(b == first ? opening : 2 * b) * NC + c;
      const float f = weight(load_fresh(a.moments + 2 * row), top);
      l += f * load_fresh(a.moments + 2 * row + 1);
#pragma unroll
      for (int i = 0; i < N; i++) x[i] += f * load_fresh(a.partial + row * D + i * 32 + lane);
    }
    finish(c, x, top, l);
  }
};

}  // namespace jt
