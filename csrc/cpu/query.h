// The query rows of an item, arranged once as operands of every chunk's scores.
#pragma once
#include "job.h"

namespace jettison::JETTISON_TIER {

inline void quantise_query(const Job& job, int row, const float* q) {
  int16_t integers[kMaxHead + 64] = {};
  float most = 0, poison = 0;
  for (int d = 0; d < job.size; d++) {
    most = std::max(most, std::fabs(q[d]));
    poison += q[d] - q[d];
  }
  const float inverse = integers_per_unit(most);
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

}  // namespace jettison::JETTISON_TIER
