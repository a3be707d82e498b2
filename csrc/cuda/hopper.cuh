// What only Hopper has: warpgroup matrix products, tensor copies, clusters. No host simulation of these.
#pragma once
#include "primitives.cuh"

namespace jt {

// A CUtensorMap, encoded by the driver on the host.
struct alignas(64) TensorMap {
  u64 words[16];
};

JT_DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0,%%cluster_ctarank;" : "=r"(r));
  return r;
}
JT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The threads of one warpgroup.
JT_DEVICE void group_sync(int id) { asm volatile("bar.sync %0,128;" ::"r"(id) : "memory"); }

// One more arrival at the barrier of block `rank` of the cluster.
JT_DEVICE void barrier_arrive_at(u64* bar, u32 rank) {
  asm volatile(
      "{\n.reg .b32 r;\nmapa.shared::cluster.u32 r,%0,%1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _,[r];\n}" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}
// As barrier_wait, for arrivals of other blocks of the cluster too.
JT_DEVICE void cluster_barrier_wait(u64* bar, u32 phase) {
  const u32 address = shared_address(bar);
#pragma unroll 1
  for (int k = 0; k < 8000000; k++) {
    u32 ready;
    asm volatile("{\n.reg .pred P;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P,[%1],%2;\nselp.b32 %0,1,0,P;\n}"
                 : "=r"(ready)
                 : "r"(address), "r"(phase)
                 : "memory");
    if (ready) return;
  }
  __trap();
}

// A box of a matrix, from column x and row y on; outside of the matrix it is zero.
JT_DEVICE void tensor_load(void* to, const TensorMap& map, i32 x, i32 y, u64* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(
                   shared_address(to)),
               "l"(&map), "r"(x), "r"(y), "r"(shared_address(bar))
               : "memory");
}
// The same into every block of the cluster whose bit is set, at the same place, counted at its barrier of the same place.
JT_DEVICE void tensor_load_all(void* to, const TensorMap& map, i32 x, i32 y, u64* bar, u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1,{%2,%3}],[%4],%5;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(bar)), "h"(blocks)
      : "memory");
}
JT_DEVICE void tensor_store(const TensorMap& map, const void* from, i32 x, i32 y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0,{%1,%2}],[%3];" ::"l"(&map), "r"(x), "r"(y),
               "r"(shared_address(from))
               : "memory");
}
JT_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
JT_DEVICE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
JT_DEVICE void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
JT_DEVICE void tensor_map_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

template <int N>
JT_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
JT_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
JT_DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Rows of 128 bytes in the 128-byte swizzle, groups of eight rows one after another, reduction along the row.
JT_DEVICE u64 matrix_descriptor(const void* tile) {
  return (u64)((shared_address(tile) & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
JT_DEVICE void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JT_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
JT_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler must neither move nor copy these between an asynchronous product and its end.
template <int N>
JT_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define JT_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d (+)= A x B': 64 x 32 by 128 x 32, e4m3; `add`: 0 forgets d.
JT_DEVICE void product_64x128x32(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p,%66,0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
      "%62,%63},%64,%65,p,1,1;\n}"
      : JT_ACC8(d, 0), JT_ACC8(d, 8), JT_ACC8(d, 16), JT_ACC8(d, 24), JT_ACC8(d, 32), JT_ACC8(d, 40), JT_ACC8(d, 48), JT_ACC8(d, 56)
      : "l"(a), "l"(b), "r"(add)
      : "memory");
}
#undef JT_ACC8

}  // namespace jt
