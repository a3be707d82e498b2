// A warp's stream of steps: bulk copies of tiles into its ring, issued ahead.
#pragma once
#include "attention.cuh"

namespace jt {

// Each lane keeps the address of one of the next 32 tiles and issues its own copies, so the loop holds neither shuffles
// nor address arithmetic.
template <class S>
struct Feed {
  const AttentionArgs& a;
  const Piece* piece;
  const u8* mine;
  i32 next;                      // page of this lane's tile in the 32 after the current ones
  i32 begin, steps;              // the warp's share of the piece, in steps of the item
  i32 available;                 // tiles from the share's first until the sequence ends
  Policy policy;

  JT_DEVICE Feed(const AttentionArgs& args, Policy p) : a(args), policy(p) {}

  // Turn to the warp's share of a piece and fill the ring from `slot` on.
  JT_DEVICE void open(const Piece* p, int slot) {
    piece = p;
    const int lane = thread() & 31, warp = thread() >> 5;
    const i32 length = p->end - p->e.begin;
    begin = p->e.begin + length * warp / S::W;
    steps = p->e.begin + length * (warp + 1) / S::W - begin;
    available = (p->e.len + 15) / 16 - origin();
    mine = address(page_of(lane), lane);
    next = page_of(32 + lane);
#pragma unroll 1
    for (int i = 0; i < S::STAGES && i < steps; i++) issue(i, (slot + i) % S::STAGES);
  }
  JT_DEVICE i32 origin() const { return 2 * (piece->e.first + begin); }
  JT_DEVICE i32 page_of(i32 tile) const {
    const i32* table = a.block_table + (i64)piece->e.seq * a.table_stride;
    return tile < smaller(available, 2 * steps) ? table[(origin() + tile) / a.page_tiles] : 0;
  }
  JT_DEVICE const u8* address(i32 page, i32 tile) const {
    return a.cache + piece->e.head * a.head_stride + (i64)page * a.block_stride + (i64)((origin() + tile) % a.page_tiles) * S::P::tile;
  }
  JT_DEVICE void issue(i32 step, int slot) {
    const int lane = thread() & 31, warp = thread() >> 5;
    const i32 tile = 2 * step;
    if (tile && tile % 32 == 0) {
      mine = address(next, tile + lane);
      next = page_of(tile + 32 + lane);
    }
    const int turn = (lane - tile) & 31;
    if (turn < 2) {
      u64* bar = S::barrier(warp, slot);
      const bool there = tile + turn < available;
      barrier_expect(bar, there ? S::P::tile : 0);
      if (there) bulk_copy(S::slot(warp, slot) + turn * S::P::tile, mine, S::P::tile, bar, policy);
    }
  }
};

}  // namespace jt
