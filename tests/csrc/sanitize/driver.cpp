// Runs every tier that this processor has over random shapes, in heap blocks of exactly the right size, for a build
// with -fsanitize=address,undefined. No torch.
#include <cstdio>
#include <cstring>
#include <random>

#include "plan.h"

using namespace jettison;

static std::mt19937 rng(20260);
static int pick(int low, int high) { return low + (int)(rng() % (unsigned)(high - low + 1)); }
static int one_of(std::initializer_list<int> options) { return options.begin()[pick(0, (int)options.size() - 1)]; }

static void round(const Tier& tier) {
  const int size = 16 * pick(2, 16), heads = pick(1, 3), group = one_of({1, 2, 3, 5, 8, 32});
  const int block_size = 16 * pick(1, 9), sequences = pick(0, 4);
  const Page page{size, one_of({16, 8, 4, 2}), one_of({16, 8, 4, 2}), one_of({0, 0, 1, 4, 16})};
  std::vector<int32_t> starts{0}, lengths, table;
  int columns = 1, blocks = 0, tokens = 0;
  for (int s = 0; s < sequences; s++) {
    lengths.push_back(pick(1, one_of({20, 200, 2500})));
    starts.push_back(starts.back() + pick(0, std::min(lengths.back(), one_of({1, 4, 40}))));
    columns = std::max(columns, (lengths.back() + block_size - 1) / block_size);
  }
  table.assign((size_t)sequences * columns, 0);
  std::vector<int64_t> slots;
  for (int s = 0; s < sequences; s++) {
    const int used = (lengths[s] + block_size - 1) / block_size;
    for (int i = 0; i < used; i++) table[s * columns + i] = blocks + i;
    for (int t = 0; t < lengths[s]; t++) slots.push_back(rng() % 9 ? (int64_t)blocks * block_size + t : -1);
    blocks += used;
    tokens += lengths[s];
  }
  const int64_t cell = (int64_t)block_size * page.bytes_per_token(block_size);
  std::unique_ptr<uint8_t[]> cache(new uint8_t[blocks * heads * cell]);
  for (int64_t i = 0; i < blocks * heads * cell; i++) cache[i] = (uint8_t)rng();
  const auto fill = [&](int64_t n) {
    std::unique_ptr<float[]> x(new float[n]);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(int)(rng() % 2001) / 1000.f - 1.f;
    return x;
  };
  const auto key = fill((int64_t)tokens * heads * size), value = fill((int64_t)tokens * heads * size);
  const auto query = fill((int64_t)starts.back() * heads * group * size), output = fill((int64_t)starts.back() * heads * group * size);
  const auto scale = fill(heads * size), sinks = fill(heads * group);
  const Cache pages{cache.get(), heads * cell, cell, block_size, page};
  const int64_t row = (int64_t)heads * size;
  StoreArgs store{{key.get(), row, size, Dtype::kFloat32}, {value.get(), row, size, Dtype::kFloat32}, pages, slots.data(), heads,
                  pick(0, 1) == 1, scale.get(), nullptr};
  tier.store(store, 0, tokens);
  const Strided q{query.get(), row * group, size, Dtype::kFloat32}, o{output.get(), row * group, size, Dtype::kFloat32};
  AttentionArgs args{q, o, pages, starts.data(), lengths.data(), table.data(), columns, heads * group, heads, 0.1f, store.rotate,
                     scale.get(), one_of({-1, 1, 30, 1100}), pick(0, 3) ? 0.f : 10.f, pick(0, 1) ? sinks.get() : nullptr};
  Plan plan(args, sequences);
  std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, (tier.workspace_bytes(page) + 63) / 64 * 64), std::free);
  std::memset(memory.get(), 0, tier.workspace_bytes(page));
  for (int u = 0; u < (int)plan.units.size(); u++) plan.run(tier, args, u, memory.get());
}

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  const Tier* tiers[] = {&kTierPortable, &kTierAvx2, &kTierAvx512};
  for (int i = 0; i < rounds; i++)
    for (int t = 0; t <= detect_tier(); t++) round(*tiers[t]);
  std::printf("%d rounds on %d tiers: no finding\n", rounds, detect_tier() + 1);
}
