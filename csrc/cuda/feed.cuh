// A warp's stream of steps: bulk copies of tiles into its ring, issued ahead.
#pragma once
#include "attention.cuh"

namespace jt {

// Each lane keeps the address of one of the next 32 tiles and issues its own copies, so the loop holds neither shuffles
// nor address arithmetic.
template <class S>
struct Feed {
  const AttentionArgs& a;
  const u8* mine;
  i32 page, next;        // of this lane's tile in the current 32 and in those after them
  i32 steps, available;  // of the warp's share: steps; tiles from its first until the sequence ends
  Policy policy;

  JT_DEVICE Feed(const AttentionArgs& args, Policy p) : a(args), policy(p) {}

  // Turn to the warp's share of a piece: its page numbers are on their way.
  JT_DEVICE void turn_to(const Piece& piece) {
    const int lane = thread() & 31, warp = thread() >> 5;
    steps = piece.share(warp + 1, S::W) - piece.share(warp, S::W);
    available = (piece.e.len + 15) / 16 - origin(piece);
    page = page_of(piece, lane);
    next = page_of(piece, 32 + lane);
  }
  // Fill the ring from `slot` on.
  JT_DEVICE void open(const Piece& piece, int slot) {
    mine = address(piece, page, thread() & 31);
#pragma unroll 1
    for (int i = 0; i < S::STAGES && i < steps; i++) issue(piece, i, (slot + i) % S::STAGES);
  }
  static JT_DEVICE i32 origin(const Piece& piece) { return 2 * (piece.e.first + piece.share(thread() >> 5, S::W)); }
  JT_DEVICE i32 page_of(const Piece& piece, i32 tile) const {
    const i32* table = a.block_table + (i64)piece.e.seq * a.table_stride;
    return tile < smaller(available, 2 * steps) ? table[(origin(piece) + tile) / a.page_tiles] : 0;
  }
  JT_DEVICE const u8* address(const Piece& piece, i32 page, i32 tile) const {
    return a.cache + piece.e.head * a.head_stride + (i64)page * a.block_stride + (i64)((origin(piece) + tile) % a.page_tiles) * S::P::tile;
  }
  JT_DEVICE void issue(const Piece& piece, i32 step, int slot) {
    const int lane = thread() & 31, warp = thread() >> 5;
    const i32 tile = 2 * step;
    if (tile && tile % 32 == 0) {
      mine = address(piece, next, tile + lane);
      next = page_of(piece, tile + 32 + lane);
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
