// One work item on its way: a thread's memory and what every step needs to know.
#pragma once
#include <algorithm>

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

}  // namespace jettison::JETTISON_TIER
