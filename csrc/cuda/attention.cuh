// What the parts of the attention kernel share: its shape, its arguments, its shared memory, one piece of work.
#pragma once
#include "fragments.cuh"
#include "plan.cuh"
#include "rows.cuh"

namespace jt {

constexpr float kLog2E = 1.4426950408889634f;

struct AttentionArgs {
  Batch batch;
  const u8* cache;
  const void* query;
  void* output;
  const i32* block_table;
  const float* key_scale;
  const float* head_sinks;
  const Header* header;
  const Entry* entries;
  float* partial;  // [2 * blocks][NC][D]
  float* moments;  // [2 * blocks][NC][2]: maximum (log2), sum
  u32* counters;   // [blocks], zero between launches
  i64 block_stride, head_stride, query_stride, output_stride;  // bytes, bytes, elements, elements
  i32 query_head_stride, output_head_stride, table_stride, page_tiles;
  float scale, softcap;
};

// A piece: steps [begin, end) of the item in `e`. Pieces live in shared memory: the main loop has no register to spare
// for what it needs at the ends only.
struct Piece {
  Entry e;
  i32 end;
  i32 opens;                 // the first of its block
  i32 readable;              // first token that some column sees; before it a page may hold anything
  i32 inner_from, inner_to;  // all columns see all of these tokens, and none is a sink
  i32 left;                  // of the block's range after this piece; nothing if not above 0
  i32 item_cost;
  i32 padding;
  JT_DEVICE bool whole() const { return e.begin == 0 && end == e.steps; }
  // First step of share `i` of `n`.
  JT_DEVICE i32 share(i32 i, i32 n) const { return e.begin + (end - e.begin) * i / n; }

  JT_DEVICE void set(const Entry& entry, i32 range, i32 cost, bool first, i32 window, i32 sinks) {
    e = entry;
    end = smaller(e.steps, e.begin + range);
    left = range - (end - e.begin) - cost;
    item_cost = cost;
    opens = first;
    inner_to = e.len - e.queries + 1;
    readable = window > 0 ? larger(0, inner_to - window) : 0;
    inner_from = larger(sinks, window > 0 ? e.len - window : 0);
  }
};

// Query column c of an item: which token and head, and what it sees.
struct Column {
  i32 token, head;  // of the batch; token < 0 for a column that pads the tile
  i32 from, to;     // visible tokens
};
template <int NC>
JT_DEVICE Column column_of(const AttentionArgs& a, const Entry& e, int c) {
  const i32 index = e.tile * NC + c, local = index / a.batch.group;
  const bool real = local < e.queries;
  Column r;
  r.token = real ? e.query_start + local : -1;
  r.head = e.head * a.batch.group + index - local * a.batch.group;
  r.to = e.len - (real ? e.queries - 1 - local : 0);
  r.from = a.batch.window > 0 ? larger(0, r.to - a.batch.window) : 0;
  return r;
}

// NC query columns by W warps; a ring of STAGES steps per warp; PLACES blocks per SM.
template <int D_, int KB_, int VB_, int SINKS_, int NC_, int W_, int STAGES_, int PLACES_, bool ROTATE_, bool CAP_, Type T_>
struct Shape {
  static constexpr int D = D_, KB = KB_, VB = VB_, SINKS = SINKS_, NC = NC_, W = W_, STAGES = STAGES_, PLACES = PLACES_;
  static constexpr bool ROTATE = ROTATE_, CAP = CAP_, BF16 = T_ == Type::bf16;
  static constexpr Type T = T_;
  using P = Page<D, KB, VB, SINKS>;
  using K = KeyRow<D, KB>;
  using V = ValuePair<D, KB, VB>;
  static_assert(NC == 4 || NC == 8 || NC == 16, "4, 8 or 16 columns");
  // Up to four columns leave half of the tensor core's eight idle: they serve both tiles of a step at once.
  static constexpr bool PAIR = NC == 4;
  static constexpr int NT = NC == 16 ? 2 : 1, SUB = PAIR ? 1 : 2, COLS = 2 * NT;

  static constexpr int threads = 32 * W, stage = 2 * P::tile, ring = (W * STAGES * stage + 15) / 16 * 16;
  static constexpr int parts = W + (SINKS ? 1 : 0), parts_bytes = parts * NC * (D + 2) * 4;
  // Rows of the query start 4 banks apart, channels 32 apart 1 bank apart: fragments are read without conflicts.
  static constexpr int query_row = (D + D / 32 + 27) / 32 * 32 + 4, query_bytes = NC * query_row * 4;
  static constexpr int barrier_bytes = W * STAGES * 8;
  static constexpr int piece_start = query_bytes + (barrier_bytes + 15) / 16 * 16, fixed_bytes = piece_start + 4 * sizeof(Piece) + 32;
  // Where shared memory suffices, the parts have a place of their own and the next piece is fetched during the merge.
  static constexpr bool OVERLAP = ring + parts_bytes + fixed_bytes + 1024 <= 227 * 1024 / PLACES;
  static constexpr int ring_bytes = OVERLAP || ring > parts_bytes ? ring : (parts_bytes + 15) / 16 * 16;
  static constexpr int shared_bytes = ring_bytes + fixed_bytes + (OVERLAP ? parts_bytes : 0);

  static JT_DEVICE u8* slot(int warp, int i) { return shared_memory() + (warp * STAGES + i) * stage; }
  static JT_DEVICE float* query(int c, int d) { return (float*)(shared_memory() + ring_bytes) + c * query_row + d + d / 32; }
  static JT_DEVICE u64* barrier(int warp, int i) { return (u64*)(shared_memory() + ring_bytes + query_bytes) + warp * STAGES + i; }
  static JT_DEVICE Piece& piece(int i) { return ((Piece*)(shared_memory() + ring_bytes + piece_start))[i]; }
  static JT_DEVICE i32* note(int i) { return (i32*)&piece(4) + 4 * i; }
  static JT_DEVICE float* part_memory() { return (float*)(shared_memory() + (OVERLAP ? ring_bytes + fixed_bytes : 0)); }

  // A part per warp: sums of NC columns x D channels, then their moments. Register i of a column of lane group g lies
  // where neither its writer nor its reader meets bank conflicts.
  static JT_DEVICE float* sum(int part, int column, int g, int i) {
    constexpr int rows = PAIR ? D / 16 : D / 8;
    const int t = PAIR ? column / 2 + 2 * (i & 1) : column % 8 / 2, block = PAIR ? column & 1 : column / 8 * 2 + (column & 1);
    const int at = ((part * COLS + block) * rows + (PAIR ? i / 2 : i)) * 32 + ((g * 4 + t + (PAIR ? i / 2 * 2 : i) / (D / 32)) & 31);
    return part_memory() + at;
  }
  static JT_DEVICE float* moments(int part, int column) { return part_memory() + parts * NC * D + (part * NC + column) * 2; }

  // Where channel Lanes<D>::channel(lane, j) of a column lies: lane group and register.
  static JT_DEVICE void place(int lane, int j, int& g, int& i) {
    if constexpr (Lanes<D>::wide) {
      g = lane >> 2, i = (lane & 3) * (D / 32) + j;
    } else {
      const int d = j * 32 + lane;
      if constexpr (V::split) {
        const int r = d % 24;
        g = d / 24 * 2 + (r >= 12), i = r < 12 ? r : r < 16 ? r - 4 : r - 16;
      } else {
        g = d / (D / 8), i = d % (D / 8);
      }
    }
  }
};

}  // namespace jt
