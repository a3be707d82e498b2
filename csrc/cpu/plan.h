// How one attention call is cut into work.
//
// Tokens are cut at absolute multiples of kSegmentTokens. A segment's partial result is computed by itself and folded
// in order, whether one thread does all of them (prefill) or several do (decode): a row's result depends neither on
// the number of threads, nor on its batch, nor on how its prompt was chunked.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"

namespace jettison {

struct Unit {
  int item, first, last;  // segments
};

struct Plan {
  std::vector<Item> items;
  std::vector<Unit> units;
  std::vector<float> partials;
  std::unique_ptr<std::atomic<int>[]> missing;  // partial results still to come, per item

  Plan(const AttentionArgs& args, int sequences) {
    const int group = args.query_heads / args.kv_heads, per_item = std::max(1, kMaxRows / group);
    int64_t floats = 0;
    for (int s = 0; s < sequences; s++) {
      const int queries = args.query_start[s + 1] - args.query_start[s];
      const int64_t before = args.seq_lens[s] - queries;
      const bool split = queries <= per_item;
      for (int head = 0; head < args.kv_heads; head++)
        for (int q = 0; q < queries; q += per_item) {
          const int count = std::min(per_item, queries - q);
          const int64_t from = args.window > 0 ? std::max<int64_t>(0, before + q - args.window + 1) : 0;
          const int first = (int)(from / kSegmentTokens), last = (int)((before + q + count - 1) / kSegmentTokens) + 1;
          Item item{s, head, q, count, first, last - first, -1};
          const int index = (int)items.size();
          if (split && last - first > 1) {
            item.partials = floats;
            floats += (int64_t)(last - first) * count * group * (args.cache.page.head_size + 2);
            for (int g = first; g < last; g++) units.push_back({index, g, g + 1});
          } else {
            units.push_back({index, first, last});
          }
          items.push_back(item);
        }
    }
    partials.resize(floats);
    missing = std::make_unique<std::atomic<int>[]>(items.size());
    for (size_t i = 0; i < items.size(); i++) missing[i].store(items[i].num_segments, std::memory_order_relaxed);
  }

  // One unit; whoever delivers an item's last partial result also folds them.
  void run(const Tier& tier, const AttentionArgs& args, int unit, void* workspace) {
    const Unit& u = units[unit];
    const Item& item = items[u.item];
    if (item.partials < 0) return tier.attend(args, item, u.first, u.last, nullptr, workspace);
    const int rows = item.num_queries * (args.query_heads / args.kv_heads);
    float* all = partials.data() + item.partials;
    float* mine = all + (int64_t)(u.first - item.first_segment) * rows * (args.cache.page.head_size + 2);
    tier.attend(args, item, u.first, u.last, mine, workspace);
    if (missing[u.item].fetch_sub(1, std::memory_order_acq_rel) == 1) tier.merge(args, item, all, workspace);
  }
};

}  // namespace jettison
