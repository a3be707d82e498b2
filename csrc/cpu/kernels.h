// Arguments of the CPU kernels and the table of functions that each instruction-set tier fills in.
// No torch here: the tier sources are compiled with their own -m flags and must not instantiate shared inline code.
#pragma once
#include <cstddef>
#include <cstdint>

#include "page.h"

namespace jettison {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kChunkTokens = 128;     // tokens whose scores share one rescaling of the accumulators
constexpr int kSegmentTokens = 1024;  // tokens whose partial result is computed alone; see plan.h
constexpr int kMaxRows = 32;          // query rows (token x head of the group) of one work item

struct Strided {  // [tokens, heads, D], last dimension contiguous, strides in elements
  void* data;
  int64_t token_stride, head_stride;
  Dtype dtype;
};

struct Cache {
  uint8_t* data;
  int64_t block_stride, head_stride;  // bytes
  int block_size;
  Page page;
};

struct StoreArgs {
  Strided key, value;
  Cache cache;
  const int64_t* slots;
  int heads;
  bool rotate;
  const float* key_center;   // [heads, D] or null
  const float* key_inverse;  // [heads, D] = 1 / key_scale, or null
};

struct AttentionArgs {
  Strided query, output;
  Cache cache;
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  int query_heads, kv_heads;
  float scale;
  bool rotate;
  const float* key_scale;  // [kv_heads, D] or null
  int window;              // visible tokens including the query's own, or <= 0 for all
  float softcap;           // 0 for none
  const float* sinks;      // [query_heads] or null
};

// A run of query rows of one sequence and KV head, against all their visible tokens.
struct Item {
  int sequence, head;
  int first_query, num_queries;       // tokens, relative to the sequence's first query
  int first_segment, num_segments;    // visible segments
  int64_t partials;                   // index of its first partial result, or -1 if one unit does it all
};

struct Tier {
  void (*store)(const StoreArgs&, int64_t begin, int64_t end);
  size_t (*workspace_bytes)(const Page&);
  // Segments [first, last) of an item. `partial` receives [rows][D + 2] floats (sum, maximum, unnormalised output);
  // null: finish the item and write its output rows.
  void (*attend)(const AttentionArgs&, const Item&, int first, int last, float* partial, void* workspace);
  // Fold the partial results of all segments of an item and write its output rows.
  void (*merge)(const AttentionArgs&, const Item&, const float* partials, void* workspace);
};

extern const Tier kTierPortable;
#if defined(__x86_64__)
extern const Tier kTierAvx2, kTierAvx512;
#endif

int detect_tier();  // 0 portable, 1 AVX2, 2 AVX-512 with VNNI; lowered by JETTISON_ISA=portable|avx2
const Tier& tier();

}  // namespace jettison
