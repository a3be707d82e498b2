// torch.ops.jettison on the stable ABI: schemas, argument checks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "plan.h"

namespace jettison {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  text << "jettison." << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

Strided rows(const char* op, const char* name, const Tensor& x) {
  require(x.dim() == 3, op, name, " has ", x.dim(), " dimensions, expected [tokens, heads, head size]");
  require(x.size(2) == 1 || x.stride(2) == 1, op, name, " must be contiguous in its last dimension");
  Dtype dtype = Dtype::kFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) dtype = Dtype::kBFloat16;
  else if (x.scalar_type() == ScalarType::Half) dtype = Dtype::kFloat16;
  else require(x.scalar_type() == ScalarType::Float, op, name, " must be float32, bfloat16 or float16");
  return {x.data_ptr(), x.stride(0), x.stride(1), dtype};
}

Cache pages(const char* op, const Tensor& x, int64_t head_size, int64_t key_bits, int64_t value_bits, int64_t sinks) {
  const auto known = [](int64_t bits) { return bits == 16 || bits == 8 || bits == 4 || bits == 2; };
  require(head_size % 16 == 0 && head_size >= 32 && head_size <= 256, op, "head size ", head_size,
          " is not a multiple of 16 from 32 to 256");
  require(known(key_bits) && known(value_bits), op, "bits are ", key_bits, " and ", value_bits,
          ", expected 16, 8, 4 or 2");
  require(sinks >= 0 && sinks <= kTile, op, "sink_tokens is ", sinks, ", expected 0 to ", kTile);
  require(x.scalar_type() == ScalarType::Byte && x.dim() == 4, op,
          "cache must be uint8 [blocks, heads, block size, bytes per token]");
  const Page page{(int)head_size, (int)key_bits, (int)value_bits, (int)sinks};
  const int64_t block_size = x.size(2), content = x.size(3);
  require(block_size >= kTile && block_size % kTile == 0, op, "block size ", block_size, " is not a multiple of ", kTile);
  require(content == page.bytes_per_token((int)block_size), op, "cache has ", content, " bytes per token, this format needs ",
          page.bytes_per_token((int)block_size));
  require(x.stride(3) == 1 && x.stride(2) == content, op, "the bytes of a page must be contiguous");
  return {(uint8_t*)x.data_ptr(), x.stride(0), x.stride(1), (int)block_size, page};
}

const float* per_channel(const char* op, const char* name, const std::optional<Tensor>& x, int64_t heads, int64_t size) {
  if (!x) return nullptr;
  require(x->scalar_type() == ScalarType::Float && x->is_contiguous(), op, name, " must be contiguous float32");
  require(x->numel() == heads * size, op, name, " has ", x->numel(), " elements, expected ", heads, " x ", size);
  return (const float*)x->data_ptr();
}

template <class T>
const T* integers(const char* op, const char* name, const Tensor& x, ScalarType type, int64_t dims) {
  require(x.scalar_type() == type && x.dim() == dims && (x.numel() == 0 || x.stride(dims - 1) == 1), op, name,
          " must be a ", dims, "-dimensional tensor of ", sizeof(T) * 8, "-bit integers, contiguous in its last dimension");
  return (const T*)x.data_ptr();
}

void kv_store(Tensor key, Tensor value, Tensor cache, Tensor slot_mapping, int64_t key_bits, int64_t value_bits,
              int64_t sink_tokens, bool rotate, std::optional<Tensor> key_center, std::optional<Tensor> key_scale) {
  const char* op = "kv_store";
  StoreArgs a{};
  a.key = rows(op, "key", key);
  a.value = rows(op, "value", value);
  const int64_t heads = key.size(1), size = key.size(2), tokens = slot_mapping.numel();
  require(value.size(1) == heads && value.size(2) == size, op, "value is [T, ", value.size(1), ", ", value.size(2),
          "], key is [T, ", heads, ", ", size, "]");
  a.cache = pages(op, cache, size, key_bits, value_bits, sink_tokens);
  require(cache.size(1) == heads, op, "cache has ", cache.size(1), " heads, key has ", heads);
  a.slots = integers<int64_t>(op, "slot_mapping", slot_mapping, ScalarType::Long, 1);
  require(tokens <= key.size(0) && tokens <= value.size(0), op, "slot_mapping names ", tokens, " tokens, key has ", key.size(0));
  a.heads = (int)heads;
  a.rotate = rotate;
  a.key_center = per_channel(op, "key_center", key_center, heads, size);
  const float* scale = per_channel(op, "key_scale", key_scale, heads, size);
  std::vector<float> inverse;
  for (int64_t i = 0; scale && i < heads * size; i++) inverse.push_back(1.0f / scale[i]);
  a.key_inverse = scale ? inverse.data() : nullptr;
  const int64_t capacity = cache.size(0) * cache.size(2);
  for (int64_t i = 0; i < tokens; i++)
    require(a.slots[i] < capacity, op, "slot ", a.slots[i], " is outside the cache of ", capacity, " tokens");
  const auto& kernels = tier();
  torch::stable::parallel_for(0, tokens, 4, [&](int64_t begin, int64_t end) { kernels.store(a, begin, end); });
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

void* workspace(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (capacity < bytes) {
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    std::memset(memory.get(), 0, bytes);
    capacity = bytes;
  }
  *(const void**)memory.get() = nullptr;  // nothing prepared
  return memory.get();
}

void check_sequences(const char* op, const AttentionArgs& a, int64_t sequences, int64_t tokens, int64_t blocks, int64_t columns) {
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t queries = a.query_start[s + 1] - a.query_start[s], length = a.seq_lens[s];
    require(a.query_start[s] >= 0 && queries >= 0 && a.query_start[s + 1] <= tokens, op, "query_start_loc of sequence ", s, " runs from ",
            a.query_start[s], " to ", a.query_start[s + 1], ", query has ", tokens, " tokens");
    if (queries == 0) continue;
    const int64_t used = (length + a.cache.block_size - 1) / a.cache.block_size;
    require(queries <= length && used <= columns, op, "sequence ", s, " has length ", length, " for ", queries, " queries and ", columns,
            " pages of ", a.cache.block_size);
    for (int64_t i = 0; i < used; i++) {
      const int64_t block = a.block_table[s * a.block_table_stride + i];
      require(block >= 0 && block < blocks, op, "block ", block, " of sequence ", s, " is outside the cache of ", blocks, " blocks");
    }
  }
}

void packed_attention(Tensor query, Tensor cache, Tensor output, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, double scale,
                      int64_t key_bits, int64_t value_bits, int64_t sink_tokens, bool rotate, std::optional<Tensor> key_scale, int64_t window,
                      double softcap, std::optional<Tensor> sinks, int64_t, std::optional<Tensor>, bool) {
  const char* op = "packed_attention";
  AttentionArgs a{};
  a.query = rows(op, "query", query);
  a.output = rows(op, "output", output);
  const int64_t size = query.size(2), sequences = seq_lens.numel();
  a.cache = pages(op, cache, size, key_bits, value_bits, sink_tokens);
  a.query_heads = (int)query.size(1);
  a.kv_heads = (int)cache.size(1);
  require(a.kv_heads > 0 && a.query_heads % a.kv_heads == 0 && a.query_heads / a.kv_heads <= kMaxRows, op, a.query_heads, " query heads over ",
          a.kv_heads, " KV heads: expected a multiple, at most ", kMaxRows, " to one");
  require(output.size(0) >= query.size(0) && output.size(1) == a.query_heads && output.size(2) == size && a.output.dtype == a.query.dtype, op,
          "output must have the shape and type of query");
  a.query_start = integers<int32_t>(op, "query_start_loc", query_start_loc, ScalarType::Int, 1);
  a.seq_lens = integers<int32_t>(op, "seq_lens", seq_lens, ScalarType::Int, 1);
  a.block_table = integers<int32_t>(op, "block_table", block_table, ScalarType::Int, 2);
  require(query_start_loc.numel() >= sequences + 1 && block_table.size(0) >= sequences, op, "query_start_loc and block_table must cover ",
          sequences, " sequences");
  a.block_table_stride = block_table.stride(0);
  a.scale = (float)scale;
  a.rotate = rotate;
  a.key_scale = per_channel(op, "key_scale", key_scale, a.kv_heads, size);
  a.window = (int)window;
  a.softcap = (float)softcap;
  a.sinks = per_channel(op, "sinks", sinks, a.query_heads, 1);
  check_sequences(op, a, sequences, query.size(0), cache.size(0), block_table.size(1));

  Plan plan(a, (int)sequences);
  const auto& kernels = tier();
  const int units = (int)plan.units.size();
  std::atomic<int> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(units, torch::stable::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    void* memory = workspace(kernels.workspace_bytes(a.cache.page));
    for (; begin < end; begin++)
      for (int unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) plan.run(kernels, a, unit, memory);
  });
}

int64_t isa_tier() { return detect_tier(); }

}  // namespace
}  // namespace jettison

STABLE_TORCH_LIBRARY(jettison, m) {
  m.def(
      "kv_store(Tensor key, Tensor value, Tensor(a!) cache, Tensor slot_mapping, int key_bits, int value_bits, int sink_tokens, "
      "bool rotate, Tensor? key_center, Tensor? key_scale) -> ()");
  m.def(
      "packed_attention(Tensor query, Tensor cache, Tensor(a!) output, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "float scale, int key_bits, int value_bits, int sink_tokens, bool rotate, Tensor? key_scale, int window, float softcap, "
      "Tensor? sinks, int max_query_len=0, Tensor(b!)? workspace=None, bool planned=False) -> ()");
  m.def(
      "kv_unpack(Tensor cache, Tensor block_table, Tensor cu_seqlens, Tensor(a!) key_out, Tensor(b!) value_out, int key_bits, "
      "int value_bits, int sink_tokens, bool rotate, Tensor? key_center, Tensor? key_scale, Tensor? starts) -> ()");
  m.def("isa_tier() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(jettison, CPU, m) {
  m.impl("kv_store", TORCH_BOX(&jettison::kv_store));
  m.impl("packed_attention", TORCH_BOX(&jettison::packed_attention));
}

STABLE_TORCH_LIBRARY_IMPL(jettison, CompositeExplicitAutograd, m) { m.impl("isa_tier", TORCH_BOX(&jettison::isa_tier)); }
