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
    i32 token = kStep * (piece.e.first + feed.begin);
    const i32 from = piece.inner_from, to = piece.inner_to - kStep;
#pragma unroll 1
    for (i32 i = 0; i < feed.steps; i++, token += kStep) {
      const bool edge = token > to || token < from;
      const u8* slot = S::slot(warp, ring.slot);
      barrier_wait(S::barrier(warp, ring.slot), ring.phases >> ring.slot & 1);
      ring.phases ^= 1u << ring.slot;
      StepData<S> data;
      data.load(slot);
      data.load_scales(slot);
      if constexpr (S::EARLY) {
        sync_warp();
        if (i + STAGES < feed.steps) feed.issue(i + STAGES, ring.slot);
      }
      if (edge) data.clear_outside(token, piece.readable, piece.e.len);
      state.step(data, token, edge, a, piece.e);
      if constexpr (!S::EARLY) {
        sync_warp();
        if (i + STAGES < feed.steps) feed.issue(i + STAGES, ring.slot);
      }
      ring.slot = ring.slot + 1 == STAGES ? 0 : ring.slot + 1;
    }
  }

  static JT_DEVICE void run(const AttentionArgs& a) {
    const int warp = thread() >> 5, lane = thread() & 31;
    const Entry& entry = a.entries[block()];
    i32 left = entry.count;
    if (left == 0) return;
    if (thread() == 0) S::piece(0).set(entry, left, true, a.batch.window, S::SINKS);
    if (lane == 0) {
      for (int i = 0; i < STAGES; i++) barrier_init(S::barrier(warp, i), 2);
      barrier_publish();
    }
    sync_block();
    Feed<S> feed(a, read_once());
    Ring ring;
    feed.open(&S::piece(0), ring.slot);
    for (int current = 0;; current ^= 1) {
      const Piece& piece = S::piece(current);
      const Merge<S> merge{a, piece};
      left -= piece.end - piece.e.begin;
      merge.load_query();
      if (thread() == 0 && left > 0) {
        Entry next = piece.e;
        Items<S::NC>{a.batch}.advance(next);
        S::piece(current ^ 1).set(next, left, false, a.batch.window, S::SINKS);
      }
      sync_block();
      Attend<S> state;
      state.begin(a);
      attend(a, piece, state, feed, ring);
      if constexpr (S::OVERLAP) {
        sync_warp();
        if (left > 0) feed.open(&S::piece(current ^ 1), ring.slot);
      }
      state.settle();
      if constexpr (!S::OVERLAP) sync_block();
      state.write_part();
      merge.attend_sinks();
      sync_block();
      merge.combine();
      if (left == 0) return;
      if constexpr (!S::OVERLAP) shared_before_bulk();
      sync_block();
      if constexpr (!S::OVERLAP) feed.open(&S::piece(current ^ 1), ring.slot);
    }
  }
};

}  // namespace jt
