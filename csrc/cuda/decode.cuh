// Attention of a few query tokens per sequence, straight from packed pages (flash decoding on tensor cores).
#pragma once
#include "feed.cuh"
#include "merge.cuh"

namespace jt {

template <class S>
struct Decode {
  static constexpr int threads = S::threads, shared_bytes = S::shared_bytes, STAGES = S::STAGES;

  // The warp's ring: the slot of its next step, and the phase that each slot's barrier completes next.
  struct Ring {
    int slot = 0;
    u32 phases = 0;
  };

  static JT_DEVICE void attend(const AttentionArgs& a, const Piece& piece, Attend<S>& state, Feed<S>& feed, Ring& ring) {
    const int warp = thread() >> 5;
    i32 token = kStep * (piece.e.first + piece.share(warp, S::W));
    const i32 from = piece.inner_from, to = piece.inner_to - kStep;
#pragma unroll 1
    for (i32 i = 0; i < feed.steps; i++, token += kStep) {
      barrier_wait(S::barrier(warp, ring.slot), ring.phases >> ring.slot & 1);
      ring.phases ^= 1u << ring.slot;
      state.step(S::slot(warp, ring.slot), token, token > to || token < from, a, piece);
      sync_warp();
      if (i + STAGES < feed.steps) feed.issue(piece, i + STAGES, ring.slot);
      ring.slot = ring.slot + 1 == STAGES ? 0 : ring.slot + 1;
    }
  }

  // Memory is slow under this kernel's own load, so what a piece needs is asked for before the last one is put away.
  static JT_DEVICE void run(const AttentionArgs& a) {
    const int warp = thread() >> 5, lane = thread() & 31;
    if (thread() == 0) {
      const Entry& entry = a.entries[block()];
      S::piece(0).set(entry, entry.count, a.header->item_cost, true, a.batch.window, S::SINKS);
      S::piece(kOpening) = S::piece(0);
    }
    if (lane == 0) {
      for (int i = 0; i < STAGES; i++) barrier_init(S::barrier(warp, i), 2);
      barrier_publish();
    }
    sync_block();
    if (S::piece(0).e.count <= 0) return;
    Feed<S> feed(a, read_once());
    Ring ring;
    typename Merge<S>::Rows rows;
    Merge<S>{a, S::piece(0)}.fetch_query(rows);
    feed.turn_to(S::piece(0));
    feed.open(S::piece(0), ring.slot);
    for (int current = 0;; current = current == 2 ? 0 : current + 1) {
      const Piece &piece = S::piece(current), &following = S::piece(current == 2 ? 0 : current + 1);
      const Merge<S> merge{a, piece};
      if (thread() == 0 && piece.left > 0) {
        Entry next = piece.e;
        Items<S::NC>{a.batch}.advance(next, piece.item_cost);
        S::piece(current == 2 ? 0 : current + 1).set(next, piece.left, piece.item_cost, false, a.batch.window, S::SINKS);
      }
      merge.put_query(rows);
      sync_block();
      Attend<S> state;
      state.begin(a);
      attend(a, piece, state, feed, ring);
      sync_warp();
      const bool more = piece.left > 0;
      if (more) {
        Merge<S>{a, following}.fetch_query(rows);
        feed.turn_to(following);
      }
      state.settle();
      if constexpr (!S::OVERLAP) sync_block();
      state.write_part();
      if constexpr (S::OVERLAP)
        if (more) feed.open(following, ring.slot);
      merge.attend_sinks();
      sync_block();
      merge.combine();
      if (!more) return Merge<S>::close(a, S::piece(kOpening), piece);
      if constexpr (!S::OVERLAP) {
        shared_before_bulk();
        sync_block();
        feed.open(following, ring.slot);
      }
    }
  }
  static constexpr int kOpening = 3;  // the place of the first piece; the others take places 0 to 2 in turn
};

}  // namespace jt
