// D = A x B' in FP8 with scales along the reduction: D[m, n] = row[m] * factor * sum over blocks j of 128 of
// a_scale[j, m] * b_scale[j, n] * (sum over k in block j of A[m, k] * B[n, k]).
//
// Persistent clusters of two blocks, one above the other, share a tile of B. In a block one thread feeds a ring of
// tiles by tensor copies; two warpgroups take 64 rows each. Products of one block of K go into fresh accumulators, which
// are then scaled into the result: while one warpgroup does that, the tensor cores work for the other.
#pragma once
#include "hopper.cuh"

namespace jt {

struct GemmArgs {
  TensorMap a, b, d;        // e4m3 [M, K], e4m3 [N, K], bf16 [M, N]; boxes: 128 x 128, 128 x 128, 64 columns x 64 rows
  const float* a_scale;     // [K / 128, a_rows]
  const float* b_scale;     // [K / 128, b_rows], or none
  const float* row_scale;   // [M], or none
  const float* factor;      // [1], or none
  i32 m, n, k, a_rows, b_rows;  // rows of scales: multiples of 256
};

// B_SCALED: B has scales of its own along K (a weight gradient); otherwise they are part of `factor`.
template <bool B_SCALED>
struct Fp8Gemm {
  static constexpr int BM = 128, BN = 256, BK = 128, STAGES = 4, CLUSTER = 2;
  static constexpr int threads = 384;
  static constexpr int a_bytes = BM * BK, b_bytes = BN * BK, stage = a_bytes + b_bytes;
  static constexpr int scale_bytes = (BM + (B_SCALED ? BN : 0)) * 4;
  static constexpr int out_bytes = 64 * 64 * 2;  // of a warpgroup, a quarter of its columns
  static constexpr int out_at = STAGES * stage, scale_at = out_at + 2 * out_bytes, barrier_at = scale_at + STAGES * scale_bytes;
  static constexpr int shared_bytes = barrier_at + 2 * STAGES * 8;
  static_assert(shared_bytes <= 227 * 1024, "shared memory");

  static JT_DEVICE u8* tile_a(int s) { return shared_memory() + s * stage; }
  static JT_DEVICE u8* tile_b(int s) { return shared_memory() + s * stage + a_bytes; }
  static JT_DEVICE float* scales(int s) { return (float*)(shared_memory() + scale_at + s * scale_bytes); }
  static JT_DEVICE u64* full(int s) { return (u64*)(shared_memory() + barrier_at) + s; }
  static JT_DEVICE u64* empty(int s) { return full(STAGES + s); }

  struct Ring {
    int slot = 0;
    u32 phase = 0;
    JT_DEVICE void next() {
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
  };

  // Tiles of a cluster, in bands of up to 8 cluster rows, so that what a wave reads stays in L2.
  struct Tiles {
    i32 rows, columns, next, step;
    JT_DEVICE Tiles(const GemmArgs& a)
        : rows((a.m + 2 * BM - 1) / (2 * BM)), columns((a.n + BN - 1) / BN), next(block() / CLUSTER), step(blocks() / CLUSTER) {}
    JT_DEVICE bool take(i32& m, i32& n) {
      if (next >= rows * columns) return false;
      const i32 band = next / (8 * columns), in_band = next - band * 8 * columns, high = smaller(8, rows - 8 * band);
      m = (8 * band + in_band % high) * 2 * BM + (i32)cluster_rank() * BM;
      n = in_band / high * BN;
      next += step;
      return true;
    }
  };

  static JT_DEVICE void produce(const GemmArgs& a) {
    const int rank = (int)cluster_rank();
    Ring ring;
    Tiles tiles(a);
    for (i32 m, n; tiles.take(m, n);) {
#pragma unroll 1
      for (i32 j = 0; j < a.k / BK; j++, ring.next()) {
        const int s = ring.slot;
        cluster_barrier_wait(empty(s), ring.phase ^ 1);
        barrier_expect(full(s), stage + scale_bytes);
        tensor_load(tile_a(s), a.a, j * BK, m, full(s));
        tensor_load_all(tile_b(s) + rank * (b_bytes / 2), a.b, j * BK, n + rank * (BN / 2), full(s), 3);
        const Policy policy = read_once();
        bulk_copy(scales(s), a.a_scale + (i64)j * a.a_rows + m, BM * 4, full(s), policy);
        if constexpr (B_SCALED) bulk_copy(scales(s) + BM, a.b_scale + (i64)j * a.b_rows + n, BN * 4, full(s), policy);
      }
    }
  }

  // result += products * scale of the row (and of the column)
  static JT_DEVICE void promote(float (&result)[64], const float (&products)[64], float upper, float lower, const float* columns) {
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      float p[4] = {products[i], products[i + 1], products[i + 2], products[i + 3]};
      if constexpr (B_SCALED) {
        const float left = columns[2 * i + (thread() & 3) * 2], right = columns[2 * i + (thread() & 3) * 2 + 1];
        p[0] *= left, p[1] *= right, p[2] *= left, p[3] *= right;
      }
      result[i] = fused(p[0], upper, result[i]), result[i + 1] = fused(p[1], upper, result[i + 1]);
      result[i + 2] = fused(p[2], lower, result[i + 2]), result[i + 3] = fused(p[3], lower, result[i + 3]);
    }
  }

  // 64 rows x 128 columns to D, through shared memory, half by half.
  static JT_DEVICE void store(const GemmArgs& a, const float (&x)[64], int group, i32 m, i32 n, float upper, float lower) {
    u8* out = shared_memory() + out_at + group * out_bytes;
    const int row = ((thread() >> 5) & 3) * 16 + (thread() & 15), high = (thread() & 31) >> 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if ((thread() & 127) == 0) stores_read();
      group_sync(1 + group);
#pragma unroll
      for (int j = 0; j < 32; j += 8) {
        const int i = half * 32 + j, chunk = j / 4 + high;  // of eight columns
        store_matrices(shared_address(out) + row * 128 + ((chunk ^ (row & 7)) << 4),
                       bfloat2(x[i] * upper, x[i + 1] * upper), bfloat2(x[i + 2] * lower, x[i + 3] * lower),
                       bfloat2(x[i + 4] * upper, x[i + 5] * upper), bfloat2(x[i + 6] * lower, x[i + 7] * lower));
      }
      shared_before_bulk();
      group_sync(1 + group);
      if ((thread() & 127) == 0) {
        tensor_store(a.d, out, n + 64 * half, m);
        stores_commit();
      }
    }
  }

  static JT_DEVICE void consume(const GemmArgs& a, int group) {
    const int row = group * 64 + ((thread() >> 5) & 3) * 16 + ((thread() & 31) >> 2);
    const int lane = thread() & 31;
    const float factor = a.factor ? *a.factor : 1.f;
    Ring ring;
    Tiles tiles(a);
    for (i32 m, n; tiles.take(m, n);) {
      float result[2][64], products[64];
#pragma unroll
      for (int i = 0; i < 64; i++) result[0][i] = result[1][i] = 0.f;
#pragma unroll 1
      for (i32 j = 0; j < a.k / BK; j++, ring.next()) {
        const int s = ring.slot;
        cluster_barrier_wait(full(s), ring.phase);
        const float upper = scales(s)[row], lower = scales(s)[row + 8];
        const u64 left = matrix_descriptor(tile_a(s) + group * (64 * BK)), right = matrix_descriptor(tile_b(s));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          pin(products);
          product_begin();
#pragma unroll
          for (int k = 0; k < BK / 32; k++) product_64x128x32(products, left + 2 * k, right + h * (128 * BK / 16) + 2 * k, k);
          product_commit();
          product_wait<0>();
          pin(products);
          if (h == 1 && !B_SCALED && lane < CLUSTER) barrier_arrive_at(empty(s), lane);
          promote(result[h], products, upper, lower, scales(s) + BM + h * 128);
          if (h == 1 && B_SCALED) {
            sync_warp();
            if (lane < CLUSTER) barrier_arrive_at(empty(s), lane);
          }
        }
      }
      const i32 last = a.m - 1;
      const float up = factor * (a.row_scale ? a.row_scale[smaller(m + row, last)] : 1.f);
      const float low = factor * (a.row_scale ? a.row_scale[smaller(m + row + 8, last)] : 1.f);
#pragma unroll
      for (int h = 0; h < 2; h++) store(a, result[h], group, m + group * 64, n + h * 128, up, low);
    }
    if ((thread() & 127) == 0) stores_done();
  }

  static JT_DEVICE void run(const GemmArgs& a) {
    const int group = thread() >> 7;  // 0 and 1 multiply, 2 feeds
    if (thread() == 0) {
      for (int s = 0; s < STAGES; s++) barrier_init(full(s), 1), barrier_init(empty(s), 8 * CLUSTER);
      barrier_publish();
    }
    cluster_sync();
    if (group == 2) {
      registers_down<24>();
      if (thread() == 256) produce(a);
    } else {
      registers_up<240>();
      consume(a, group);
    }
    cluster_sync();  // no block may leave while others still write to it
  }
};

}  // namespace jt
