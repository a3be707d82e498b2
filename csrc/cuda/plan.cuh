// How the work of one step is cut, once for all layers that share a page layout.
//
// An item is one tile of NC query columns (query token x query head) of one KV head of one sequence, a step is 32 tokens
// of an item. All steps of the batch, in (sequence, head, tile) order, are cut into equal ranges, one per resident
// block: the load is even whatever the lengths are, and a CUDA graph stays valid while they change. A block's range
// touches items in *pieces*; only its first and last piece can be part of an item that others work on too, so two slots
// per block hold all partial results.
#pragma once
#include "primitives.cuh"

namespace jt {

constexpr int kStep = 32;

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
  i32 begin, count;                     // the block's first step in the item, its steps in all (0: nothing to do)
  u32 start_low, start_high;            // number of the item's first step in the batch
  i32 unused[4];
};
struct alignas(16) Header {
  i64 total, blocks;
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
  JT_DEVICE void advance(Entry& e) const {
    const u64 start = ((u64)e.start_high << 32 | e.start_low) + e.steps;
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
  static constexpr int threads = 512, shared_bytes = (2 * threads + 1) * 8;

  static JT_DEVICE i64 inclusive_sum(i64* shared, i64 x) {
    const int me = thread();
    shared[me] = x;
    sync_block();
    for (int d = 1; d < threads; d *= 2) {
      const i64 y = me >= d ? shared[me - d] : 0;
      sync_block();
      shared[me] += y;
      sync_block();
    }
    return shared[me];
  }

  // Whole items, or whole shares of them, cost no merge: worth it where that leaves few places empty.
  static JT_DEVICE i64 blocks_for(const PlanArgs& a, i64 total, i64 items) {
    i64 use = a.places;
    if (items > 0 && use >= items && use / items * items * 10 >= use * 9) use = use / items * items;
    return larger<i64>(1, smaller<i64>(use, total / a.min_steps));
  }

  static JT_DEVICE void run(const PlanArgs& a) {
    i64* steps = reinterpret_cast<i64*>(shared_memory());  // before each thread's sequences, inclusive
    i64* counts = steps + threads;
    const Items<NC> items{a.batch};
    const i32 share = (a.batch.num_seqs + threads - 1) / threads;
    i64 sum = 0, count = 0;
    for (i32 s = thread() * share; s < smaller((thread() + 1) * share, a.batch.num_seqs); s++) {
      Entry e{};
      e.seq = s;
      items.sequence(e);
      const i64 of_sequence = e.steps ? (i64)a.batch.kv_heads * items.tiles(e) : 0;
      sum += of_sequence * e.steps;
      count += of_sequence;
    }
    inclusive_sum(steps, sum);
    inclusive_sum(counts, count);
    const i64 total = steps[threads - 1], blocks = blocks_for(a, total, counts[threads - 1]);
    if (thread() == 0) *a.header = {total, blocks};
    for (i32 block = thread(); block < a.places; block += threads) {
      Entry e{};
      if (block < blocks && total > 0) locate(e, items, steps, share, total * block / blocks, total * (block + 1) / blocks);
      a.entries[block] = e;
    }
  }

  static JT_DEVICE void locate(Entry& e, const Items<NC>& items, const i64* steps, i32 share, i64 from, i64 to) {
    i32 low = 0, high = threads - 1;
    while (low < high) {
      const i32 middle = (low + high) / 2;
      if (steps[middle] > from)
        high = middle;
      else
        low = middle + 1;
    }
    i64 at = low ? steps[low - 1] : 0;
    for (e.seq = low * share;; e.seq++) {
      items.sequence(e);
      const i64 here = (i64)items.b.kv_heads * items.tiles(e) * e.steps;
      if (from < at + here) break;
      at += here;
    }
    const i64 item = (from - at) / e.steps;
    const i32 tiles = items.tiles(e);
    const u64 start = (u64)(at + item * e.steps);
    e.head = (i32)(item / tiles), e.tile = (i32)(item % tiles);
    e.begin = (i32)(from - (i64)start), e.count = (i32)(to - from);
    e.start_low = (u32)start, e.start_high = (u32)(start >> 32);
  }
};

}  // namespace jt
