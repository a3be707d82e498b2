// Attention of one work item over packed pages; see plan.h for how a call is cut into items and segments.
#pragma once
#include "chunk.h"
#include "query.h"

namespace jettison::JETTISON_TIER {

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
