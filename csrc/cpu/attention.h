// Attention of one work item over packed pages; see plan.h for how a call is cut into items and segments.
#pragma once
#include <algorithm>
#include <new>

#include "softmax.h"

namespace jettison::JETTISON_TIER {

constexpr int kMaxHead = 256;
// Accumulators in lane order: four lanes per channel, or eight where one vector spans both halves.
constexpr int kMaxLanes = kMaxHead * 8;

// Zeroed when it is allocated; kept by a thread from call to call.
struct Workspace {
  const Item* prepared;  // whose queries are arranged below; the caller clears it before every call
  int channel_key;       // which value format `channel` describes
  int16_t channel[kMaxLanes];
  alignas(64) int32_t query[kMaxRows][kMaxHead + 64];  // arranged operands, or floats at 16 bits
  alignas(64) float plain_query[kMaxRows][kMaxHead];   // rotated and scaled, for 16-bit sink keys
  float unit[kMaxRows], zero_unit[kMaxRows];           // score per integer, score per unit of the key zero
  RowState state[kMaxRows];
  alignas(64) float lanes[kMaxRows][kMaxLanes];
  alignas(64) float sink_values[kMaxRows][kMaxHead];
  alignas(64) float total[kMaxRows][kMaxHead + 2];  // sum, maximum, output of the segments so far
  alignas(64) float part[kMaxRows][kMaxHead + 2];
  alignas(64) float scores[kRowGroup][kChunkTokens];
  alignas(64) Weights weights[kRowGroup];
  alignas(64) uint8_t last_tile[kTile * kMaxHead * 4 + 64];  // copy of a tile whose last slots were never written
  Chunk chunk;
};

using ScoreFn = void (*)(const Chunk&, const Page&, const Workspace&, int row, float (*scores)[kChunkTokens]);
using ValueFn = void (*)(const uint8_t* const*, int, int, const ValueMap&, const Weights*, const float*, const float*,
                         float*, int64_t);

// A tile of the next chunk, while this one is computed: hardware prefetchers stop at page ends.
inline void prefetch(const uint8_t* tile, int bytes) {
  for (int b = 0; tile && b < bytes; b += 64) __builtin_prefetch(tile + b, 0, 2);
}

template <int kBits, Raw16 kRaw, int kRows>
void score_rows(const Chunk& chunk, const Page& page, const Workspace& w, int row, float (*scores)[kChunkTokens]) {
  using Math = KeyMath<kBits, kRaw>;
  constexpr int64_t kStride = kMaxHead + 64;
  const auto* query = (const typename Math::Operand*)w.query[row];
  for (int t = 0; t < chunk.num_tiles; t++) {
    if (row == 0) prefetch(chunk.next_tiles[t], page.tile_bytes());
    typename Math::Acc sums[kRows];
    tile_scores<kBits, kRaw, kRows>(chunk.tiles[t], page.key_row_bytes(), query, kStride, sums);
    for (int m = 0; m < kRows; m++) {
      F s;
      if constexpr (kBits == 16) {
        s = sums[m];
      } else {
        s = mul(fset(w.zero_unit[row + m]), fload(chunk.key_zero + 16 * t));
        s = fma(mul(to_float(sums[m]), fset(w.unit[row + m])), fload(chunk.key_scale + 16 * t), s);
      }
      fstore(scores[m] + 16 * t, s);
    }
  }
}

template <int kBits, Raw16 kRaw>
constexpr ScoreFn kScoreRows[kRowGroup] = {score_rows<kBits, kRaw, 1>, score_rows<kBits, kRaw, 2>,
                                           score_rows<kBits, kRaw, 3>, score_rows<kBits, kRaw, 4>};
template <int kBits, Raw16 kRaw>
constexpr ValueFn kValueRows[kRowGroup] = {chunk_values<kBits, kRaw, 1>, chunk_values<kBits, kRaw, 2>,
                                           chunk_values<kBits, kRaw, 3>, chunk_values<kBits, kRaw, 4>};

inline const ScoreFn* score_functions(int bits, Raw16 raw) {
  switch (bits) {
    case 2: return kScoreRows<2, Raw16::kBFloat16>;
    case 4: return kScoreRows<4, Raw16::kBFloat16>;
    case 8: return kScoreRows<8, Raw16::kBFloat16>;
  }
  return raw == Raw16::kBFloat16 ? kScoreRows<16, Raw16::kBFloat16> : kScoreRows<16, Raw16::kFloat16>;
}
inline const ValueFn* value_functions(int bits, Raw16 raw) {
  switch (bits) {
    case 2: return kValueRows<2, Raw16::kBFloat16>;
    case 4: return kValueRows<4, Raw16::kBFloat16>;
    case 8: return kValueRows<8, Raw16::kBFloat16>;
  }
  return raw == Raw16::kBFloat16 ? kValueRows<16, Raw16::kBFloat16> : kValueRows<16, Raw16::kFloat16>;
}

struct Range {  // visible tokens of a row, absolute
  int64_t from, to;
};

// What one item needs all the time.
struct Job {
  const AttentionArgs& args;
  const Item& item;
  Workspace& w;
  const Page& page;
  int group, rows, size;
  int64_t first_position;  // of the item's first query token
  Raw16 raw;
  ValueMap map;
  int lane_floats;

  Job(const AttentionArgs& a, const Item& i, Workspace& ws)
      : args(a), item(i), w(ws), page(a.cache.page), group(a.query_heads / a.kv_heads), rows(i.num_queries * group),
        size(page.head_size), raw(a.query.dtype == Dtype::kFloat16 ? Raw16::kFloat16 : Raw16::kBFloat16),
        map(value_map(page)), lane_floats(value_accumulators(page) * 16) {
    const int s = i.sequence;
    first_position = a.seq_lens[s] - (a.query_start[s + 1] - a.query_start[s]) + i.first_query;
  }
  int64_t token(int row) const { return args.query_start[item.sequence] + item.first_query + row / group; }
  int head(int row) const { return item.head * group + row % group; }
  Range visible(int row) const {
    const int64_t position = first_position + row / group;
    return {args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0, position + 1};
  }
  // Scores are in log2 units unless a soft cap comes first.
  float score_factor() const { return args.softcap > 0 ? args.scale : args.scale * kLog2e; }
};

inline void quantise_query(const Job& job, int row, const float* q) {
  int16_t integers[kMaxHead + 64] = {};
  float most = 0, poison = 0;
  for (int d = 0; d < job.size; d++) {
    most = std::max(most, std::fabs(q[d]));
    poison += q[d] - q[d];
  }
  const float inverse = most > 0 ? kWeightMax / most : 0.f;
  int32_t sum = 0;
  for (int d = 0; d < job.size; d++) {
    integers[d] = (int16_t)std::nearbyintf(q[d] * inverse);
    sum += integers[d];
  }
  Workspace& w = job.w;
  w.unit[row] = most / kWeightMax * job.score_factor() + poison;  // a NaN in the query reaches every score
  w.zero_unit[row] = w.unit[row] * (float)sum;
  switch (job.page.key_bits) {
    case 2: return arrange_query<2>(integers, job.page, w.query[row]);
    case 4: return arrange_query<4>(integers, job.page, w.query[row]);
    default: return arrange_query<8>(integers, job.page, w.query[row]);
  }
}

inline void prepare(const Job& job) {
  Workspace& w = job.w;
  const int key = job.size * 32 + job.page.value_bits;
  if (w.channel_key != key) lane_channels(job.page, job.map, w.channel);
  w.channel_key = key;
  if (w.prepared == &job.item) return;
  w.prepared = &job.item;
  alignas(64) float q[kMaxHead + 64] = {};
  for (int row = 0; row < job.rows; row++) {
    load_row_floats(job.args.query, job.token(row), job.head(row), job.size, q);
    if (job.page.key_bits < 16) {
      if (job.args.key_scale)
        for (int d = 0; d < job.size; d++) q[d] *= job.args.key_scale[job.item.head * job.size + d];
      if (job.args.rotate) hadamard(q, job.size);
      quantise_query(job, row, q);
    }
    for (int d = 0; d < job.size; d++) q[d] *= job.score_factor();
    if (job.page.key_bits == 16) arrange_query<16>(q, job.page, (float*)w.query[row]);
    std::copy(q, q + job.size, w.plain_query[row]);
  }
}

// The page that holds a token.
inline const uint8_t* page_cells(const Job& job, int64_t token) {
  const Cache& cache = job.args.cache;
  const int32_t* table = job.args.block_table + job.item.sequence * job.args.block_table_stride;
  return cache.data + table[token / cache.block_size] * cache.block_stride + job.item.head * cache.head_stride;
}

// Slots outside the sequence and its window hold anything, and a weight of zero does not hide a NaN. 16-bit values have
// no scale that could be zeroed: a tile before the window is replaced by zeros, and of the last tile a copy is read in
// which the slots from `live` on are cleared.
inline const uint8_t* readable_values(const Job& job, const uint8_t* tile, int live, bool before_window) {
  alignas(64) static constexpr uint8_t kZeros[kTile * kMaxHead * 4 + kTile * 4] = {};
  if (before_window) return kZeros;
  if (live >= kTile) return tile;
  uint8_t* copy = job.w.last_tile;
  std::memcpy(copy, tile, job.page.tile_bytes());
  for (int token = live; token < kTile; token++)
    for (int word = 0; word < job.size; word++) std::memset(copy + job.page.value_offset(token, word), 0, 2);
  return copy;
}

inline void load_chunk(const Job& job, int64_t first_token, int64_t limit) {
  Chunk& chunk = job.w.chunk;
  const Cache& cache = job.args.cache;
  const Page& page = job.page;
  chunk.first_token = first_token;
  chunk.num_tiles = (int)((std::min<int64_t>(limit - first_token, kChunkTokens) + kTile - 1) / kTile);
  chunk.sinks = nullptr;
  const int sinks = first_token == 0 ? page.sink_tokens : 0;
  for (int t = 0; t < chunk.num_tiles; t++) {
    const int64_t token = first_token + kTile * t;
    const uint8_t* cells = page_cells(job, token);
    const uint8_t* tile = cells + token % cache.block_size / kTile * page.tile_bytes();
    const int live = (int)std::min<int64_t>(limit - token, kTile);
    chunk.tiles[t] =
        page.value_bits == 16 ? readable_values(job, tile, live, token + kTile <= job.visible(0).from) : tile;
    const int64_t next = token + kChunkTokens;
    chunk.next_tiles[t] =
        next < limit ? page_cells(job, next) + next % cache.block_size / kTile * page.tile_bytes() : nullptr;
    if (sinks && t == 0) chunk.sinks = cells + cache.block_size / kTile * page.tile_bytes();
    // Slots that were never written hold anything, NaN included; sink tokens are added apart.
    const Mask written = lanes(0, live), packed = lanes(t == 0 ? sinks : 0, live);
    const uint8_t* meta = tile + page.key_bytes() + page.value_bytes();
    F scale, zero;
    if (page.key_bits < 16) {
      load_meta(meta, page.meta_bytes(), 0, &scale, &zero);
      fstore(chunk.key_scale + 16 * t, select(written, scale, fzero()));
      fstore(chunk.key_zero + 16 * t, select(written, zero, fzero()));
    }
    if (page.value_bits < 16) {
      load_meta(meta, page.meta_bytes(), page.key_bits < 16, &scale, &zero);
      fstore(chunk.value_scale + 16 * t, select(packed, scale, fzero()));
      fstore(chunk.value_zero + 16 * t, select(packed, zero, fzero()));
    }
  }
}

// Scores of the sink tokens, from their 16-bit keys.
inline void sink_scores(const Job& job, int row, float* scores) {
  const uint16_t* keys = (const uint16_t*)job.w.chunk.sinks;
  for (int s = 0; s < job.page.sink_tokens; s++, keys += job.size) {
    F sum = fzero();
    for (int d = 0; d < job.size; d += 16) sum = fma(fload(job.w.plain_query[row] + d), load_fp16(keys + d), sum);
    scores[s] = hsum(sum);
  }
}

inline void sink_values(const Job& job, int row, const float* first_tile) {
  const uint16_t* values = (const uint16_t*)job.w.chunk.sinks + job.page.sink_tokens * job.size;
  float* out = job.w.sink_values[row];
  for (int s = 0; s < job.page.sink_tokens; s++, values += job.size)
    for (int d = 0; d < job.size; d += 16)
      fstore(out + d, fma(fset(first_tile[s]), load_fp16(values + d), fload(out + d)));
}

inline void attend_chunk(const Job& job, const ScoreFn* score, const ValueFn* value) {
  Workspace& w = job.w;
  const Chunk& chunk = w.chunk;
  const Page& page = job.page;
  const int64_t end = chunk.first_token + kTile * chunk.num_tiles;
  for (int row = 0; row < job.rows; row += kRowGroup) {
    const int count = std::min(kRowGroup, job.rows - row);
    score[count - 1](chunk, page, w, row, w.scores);
    float decay[kRowGroup], unit[kRowGroup];
    for (int m = 0; m < count; m++) {
      if (chunk.sinks && page.key_bits < 16) sink_scores(job, row + m, w.scores[m]);
      const Range seen = job.visible(row + m);
      const RowMask mask{(int)std::max<int64_t>(seen.from - chunk.first_token, 0),
                         (int)std::clamp<int64_t>(seen.to - chunk.first_token, 0, kChunkTokens),
                         seen.from > chunk.first_token || seen.to < end};
      alignas(64) float first_tile[kTile];
      const auto softmax = page.value_bits < 16 ? softmax_row<true> : softmax_row<false>;
      softmax(chunk, job.map, mask, job.args.softcap, w.scores[m], &w.state[row + m], &w.weights[m], first_tile,
              &decay[m], &unit[m]);
      if (page.sink_tokens && page.value_bits < 16) {
        for (int d = 0; d < job.size; d++) w.sink_values[row + m][d] *= decay[m];
        if (chunk.sinks) sink_values(job, row + m, first_tile);
      }
    }
    value[count - 1](chunk.tiles, chunk.num_tiles, page.key_bytes(), job.map, w.weights, decay, unit, w.lanes[row],
                     kMaxLanes);
  }
}

// All visible tokens of one segment -> part[row] = {sum, maximum, unnormalised output}.
inline void attend_segment(const Job& job, int segment) {
  Workspace& w = job.w;
  for (int row = 0; row < job.rows; row++) {
    w.state[row] = {-INFINITY, 0.f, 0.f};
    std::fill_n(w.lanes[row], job.lane_floats, 0.f);
    if (job.page.sink_tokens) std::fill_n(w.sink_values[row], job.size, 0.f);
  }
  const ScoreFn* score = score_functions(job.page.key_bits, job.raw);
  const ValueFn* value = value_functions(job.page.value_bits, job.raw);
  const int64_t from = job.visible(0).from, to = job.visible(job.rows - 1).to;
  const int64_t start = (int64_t)segment * kSegmentTokens, end = std::min<int64_t>(start + kSegmentTokens, to);
  for (int64_t token = start; token < end; token += kChunkTokens) {
    if (token + kChunkTokens <= from) continue;
    load_chunk(job, token, to);
    attend_chunk(job, score, value);
  }
  for (int row = 0; row < job.rows; row++) {
    float* out = w.part[row];
    out[0] = w.state[row].sum;
    out[1] = w.state[row].maximum;
    const bool sinks = job.page.sink_tokens && job.page.value_bits < 16;
    for (int d = 0; d < job.size; d++) out[2 + d] = w.state[row].zero_sum + (sinks ? w.sink_values[row][d] : 0.f);
    for (int i = 0; i < job.lane_floats; i++) out[2 + w.channel[i]] += w.lanes[row][i];
  }
}

inline void fold(float* total, const float* part, int size) {
  const float maximum = std::max(total[1], part[1]), base = maximum == -INFINITY ? 0.f : maximum;
  const float a = power(total[1] - base), b = power(part[1] - base);
  total[0] = total[0] * a + part[0] * b;
  total[1] = maximum;
  for (int d = 2; d < size + 2; d++) total[d] = total[d] * a + part[d] * b;
}

inline void finish_row(const Job& job, int row, float* total) {
  float sum = total[0];
  alignas(64) float out[kMaxHead];
  if (job.args.sinks) sum += power(job.args.sinks[job.head(row)] * kLog2e - total[1]);
  const float inverse = sum == 0 ? 0.f : 1.f / sum;  // no visible token: zeros
  for (int d = 0; d < job.size; d++) out[d] = total[2 + d] * inverse;
  if (job.args.rotate && job.page.value_bits < 16) hadamard(out, job.size);
  store_row_floats(job.args.output, job.token(row), job.head(row), job.size, out);
}

void attend(const AttentionArgs& args, const Item& item, int first, int last, float* partial, void* workspace) {
  const Job job(args, item, *(Workspace*)workspace);
  Workspace& w = job.w;
  prepare(job);
  for (int segment = first; segment < last; segment++) {
    attend_segment(job, segment);
    for (int row = 0; row < job.rows; row++) {
      if (partial) std::copy_n(w.part[row], job.size + 2, partial + row * (job.size + 2));
      else if (segment == first) std::copy_n(w.part[row], job.size + 2, w.total[row]);
      else fold(w.total[row], w.part[row], job.size);
    }
  }
  if (!partial)
    for (int row = 0; row < job.rows; row++) finish_row(job, row, w.total[row]);
}

void merge(const AttentionArgs& args, const Item& item, const float* partials, void* workspace) {
  const Job job(args, item, *(Workspace*)workspace);
  const int64_t row_floats = job.size + 2, part_floats = row_floats * job.rows;
  for (int row = 0; row < job.rows; row++) {
    float* total = job.w.total[row];
    std::copy_n(partials + row * row_floats, row_floats, total);
    for (int s = 1; s < item.num_segments; s++) fold(total, partials + s * part_floats + row * row_floats, job.size);
    finish_row(job, row, total);
  }
}

size_t workspace_bytes(const Page&) { return sizeof(Workspace); }

}  // namespace jettison::JETTISON_TIER
