// How the work of one step is cut, once for all layers that share a page layout.
//
// An item is one tile of NC query columns (query token x query head) of one KV head of one sequence, a step is 32 tokens
// of an item. All steps of the batch, in (sequence, head, tile) order, are cut into equal ranges, one per resident
// block: the load is even whatever the lengths are, and a CUDA graph stays valid while they change. A block's range
// touches items in *pieces*; only its first and last piece can be part of an item that others work on too, so two slots
// per block hold all partial results.
//
// To begin an item costs about as much as `kItemCost` steps, so that many positions precede its steps in the line that
// is cut. (Not where all items are equal: then whole items, or equal shares of them, fall to each block.)
#pragma once
#include "primitives.cuh"

namespace jt {

constexpr int kStep = 32;
constexpr int kItemCost = 12;

struct Batch {
  const i32* query_start;
  const i32* seq_lens;
  i32 num_seqs, kv_heads, group, window;
};

// Where one block begins.
struct alignas(16) Entry {
  i32 seq, head, tile;                  // item
  i32 len, queries, query_start;        // of the sequence
  i32 first, steps;                     // the item's steps begin at token 32 * first
  i32 begin, count;                     // the block's first step in the item; positions from there to its range's end
  u32 start_low, start_high;            // position of the item
  i32 unused[4];
};
struct alignas(16) Header {
  i64 total;  // positions
  i32 blocks, item_cost;
  // The block whose range holds position p.
  JT_DEVICE i32 owner(i64 p) const { return (i32)(((p + 1) * blocks - 1) / total); }
  JT_DEVICE i64 range(i32 block) const { return total * block / blocks; }
};

template <int NC>
struct Items {
  const Batch& b;
  JT_DEVICE void sequence(Entry& e) const {
    e.query_start = b.query_start[e.seq];
    e.queries = b.query_start[e.seq + 1] - e.query_start;
    e.len = b.seq_lens[e.seq];
    e.first = 0;
    if (b.window > 0) e.first = larger(0, e.len - e.queries - b.window + 1) / kStep;
    e.steps = e.queries > 0 && e.len > 0 ? (e.len + kStep - 1) / kStep - e.first : 0;
  }
  JT_DEVICE i32 tiles(const Entry& e) const { return (e.queries * b.group + NC - 1) / NC; }
  // The next item that has steps; there is one.
  JT_DEVICE void advance(Entry& e, i32 item_cost) const {
    const u64 start = ((u64)e.start_high << 32 | e.start_low) + e.steps + item_cost;
    e.start_low = (u32)start, e.start_high = (u32)(start >> 32);
    e.begin = 0;
    if (++e.tile < tiles(e)) return;
    e.tile = 0;
    if (++e.head < b.kv_heads) return;
    e.head = 0;
    do {
      e.seq++;
      sequence(e);
    } while (e.steps == 0);
  }
};

struct PlanArgs {
  Batch batch;
  Header* header;
  Entry* entries;  // [places]
  i32 places, min_steps;
};

template <int NC>
struct Plan {
  // Of a run of sequences.
  struct Work {
    i64 steps, items;
    i32 least, most;  // steps of an item
  };
  static constexpr int threads = 512, shared_bytes = threads * sizeof(Work);

  static JT_DEVICE Work join(const Work& x, const Work& y) {
    return {x.steps + y.steps, x.items + y.items, smaller(x.least, y.least), larger(x.most, y.most)};
  }
  // shared[i]: the work of threads 0 .. i
  static JT_DEVICE void scan(Work* shared, Work x) {
    const int me = thread();
    shared[me] = x;
    sync_block();
    for (int d = 1; d < threads; d *= 2) {
      if (me >= d) x = join(shared[me - d], x);
      sync_block();
      shared[me] = x;
      sync_block();
    }
  }

  static JT_DEVICE Header header(const PlanArgs& a, const Work& all) {
    const bool equal = all.least == all.most;
    Header h;
    h.item_cost = equal ? 0 : kItemCost;
    h.total = all.steps + all.items * h.item_cost;
    i64 use = smaller<i64>(a.places, h.total / a.min_steps);
    // Whole items, or equal shares of them: worth it where that leaves few places empty.
    if (equal && use >= all.items && use / all.items * all.items * 10 >= use * 9) use = use / all.items * all.items;
    h.blocks = (i32)larger<i64>(1, use);
    return h;
  }

  static JT_DEVICE void run(const PlanArgs& a) {
    Work* before = reinterpret_cast<Work*>(shared_memory());
    const Items<NC> items{a.batch};
    const i32 share = (a.batch.num_seqs + threads - 1) / threads;
    Work mine{0, 0, 0x7fffffff, 0};
    for (i32 s = thread() * share; s < smaller((thread() + 1) * share, a.batch.num_seqs); s++) {
      Entry e{};
      e.seq = s;
      items.sequence(e);
      const i64 count = (i64)a.batch.kv_heads * items.tiles(e);
      if (e.steps) mine = join(mine, {count * e.steps, count, e.steps, e.steps});
    }
    scan(before, mine);
    const Work all = before[threads - 1];
    const Header h = all.items ? header(a, all) : Header{0, 1, 0};
    if (thread() == 0) *a.header = h;
    for (i32 block = thread(); block < a.places; block += threads) {
      Entry e{};
      if (block < h.blocks && h.total > 0) locate(e, items, before, share, h, block);
      a.entries[block] = e;
    }
  }

  static JT_DEVICE void locate(Entry& e, const Items<NC>& items, const Work* before, i32 share, const Header& h, i32 block) {
    const i64 from = h.range(block), to = h.range(block + 1);
    auto position = [&](const Work& w) { return w.steps + w.items * h.item_cost; };
    i32 low = 0, high = threads - 1;
    while (low < high) {
      const i32 middle = (low + high) / 2;
      if (position(before[middle]) > from)
        high = middle;
      else
        low = middle + 1;
    }
    i64 at = low ? position(before[low - 1]) : 0, size;
    for (e.seq = low * share;; e.seq++) {
      items.sequence(e);
      size = e.steps + h.item_cost;
      const i64 here = e.steps ? (i64)items.b.kv_heads * items.tiles(e) * size : 0;
      if (from < at + here) break;
      at += here;
    }
    const i64 item = (from - at) / size, start = at + item * size;
    const i32 tiles = items.tiles(e);
    e.head = (i32)(item / tiles), e.tile = (i32)(item % tiles);
    e.begin = (i32)larger<i64>(0, from - start - h.item_cost);
    e.count = (i32)larger<i64>(0, to - (start + h.item_cost + e.begin));
    e.start_low = (u32)start, e.start_high = (u32)((u64)start >> 32);
  }
};

}  // namespace jt
