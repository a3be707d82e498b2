// What the kernels use of the machine, one thin wrapper each. Compiled for sm_90a without any header of the toolkit
// (NVRTC is enough); compiled as plain C++ it is simulated on the host, where tests run whole kernels.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define JT_DEVICE __device__ __forceinline__
#define JT_KERNEL extern "C" __global__ void
#define JT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define JT_CONST static constexpr __device__

namespace jt {

JT_DEVICE int thread() { return threadIdx.x; }
JT_DEVICE int block() { return blockIdx.x; }
JT_DEVICE int blocks() { return gridDim.x; }
JT_DEVICE int block_threads() { return blockDim.x; }
JT_DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}
JT_DEVICE void sync_warp() { __syncwarp(); }
JT_DEVICE void sync_block() { __syncthreads(); }
JT_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
JT_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
JT_DEVICE bool any(bool x) { return __any_sync(~0u, x); }
JT_DEVICE void publish() { __threadfence(); }
JT_DEVICE u32 count_up(u32* counter, u32 last) { return atomicInc(counter, last); }

JT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
JT_DEVICE float as_float(u32 x) { return __uint_as_float(x); }
JT_DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
JT_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// A product that is rounded, never contracted into a sum.
JT_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
JT_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
JT_DEVICE float round_even(float x) { return rintf(x); }

// low half from `low`, high half from `high`
JT_DEVICE u32 half2(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// Two E4M3 codes, magnitudes held within 448, NaN 0x7f.
JT_DEVICE u32 e4m3x2(float low, float high) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0,%1,%2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
JT_DEVICE u32 bfloat2(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
JT_DEVICE float half_value(u32 x) {
  float y;
  asm("{\n.reg .b16 l,h;\nmov.b32 {l,h},%1;\ncvt.f32.f16 %0,l;\n}" : "=f"(y) : "r"(x));
  return y;
}
JT_DEVICE u32 half_down(float x) {
  u16 y;
  asm("cvt.rm.f16.f32 %0,%1;" : "=h"(y) : "f"(x));
  return y;
}
JT_DEVICE u32 half_up(float x) {
  u16 y;
  asm("cvt.rp.f16.f32 %0,%1;" : "=h"(y) : "f"(x));
  return y;
}

template <bool BF16>
JT_DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (BF16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 8x8 matrix of 16-bit elements, two per lane along a row -> its transpose
JT_DEVICE u32 transpose(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

JT_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
struct Policy {
  u64 bits;
};
JT_DEVICE Policy read_once() {
  Policy p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(p.bits));
  return p;
}
JT_DEVICE void barrier_init(u64* bar, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
JT_DEVICE void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
JT_DEVICE void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// The bound turns a hang into an error of this launch alone.
JT_DEVICE void barrier_wait(u64* bar, u32 phase) {
  const u32 address = shared_address(bar);
#pragma unroll 1
  for (int k = 0; k < 8000000; k++) {
    u32 ready;
    asm volatile("{\n.reg .pred P;\nmbarrier.try_wait.parity.shared.b64 P,[%1],%2;\nselp.b32 %0,1,0,P;\n}"
                 : "=r"(ready)
                 : "r"(address), "r"(phase)
                 : "memory");
    if (ready) return;
  }
  __trap();
}
JT_DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* bar, Policy policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(policy.bits)
               : "memory");
}
// What this thread wrote to shared memory by ordinary stores comes before later bulk copies into it.
JT_DEVICE void shared_before_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Reads around L1, which does not see what other blocks wrote.
JT_DEVICE float load_fresh(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0,[%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

}  // namespace jt

#else
#include "simt.h"
#endif

namespace jt {

template <class T>
JT_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
JT_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}
JT_DEVICE float infinity() { return as_float(0x7f800000u); }

// N aligned words by the widest loads; the pointer is in shared memory or known to be read-only.
template <int N>
JT_DEVICE void load_words(u32* to, const u8* from) {
  if constexpr (N % 4 == 0) {
    struct alignas(16) Four {
      u32 x[4];
    };
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Four f = *reinterpret_cast<const Four*>(from + 4 * i);
      to[i] = f.x[0], to[i + 1] = f.x[1], to[i + 2] = f.x[2], to[i + 3] = f.x[3];
    }
  } else if constexpr (N % 2 == 0) {
    struct alignas(8) Two {
      u32 x[2];
    };
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const Two f = *reinterpret_cast<const Two*>(from + 4 * i);
      to[i] = f.x[0], to[i + 1] = f.x[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = *reinterpret_cast<const u32*>(from + 4 * i);
  }
}

enum class Type { f32, bf16, f16 };

template <Type T>
JT_DEVICE float load_element(const void* base, i64 index) {
  if constexpr (T == Type::f32) return static_cast<const float*>(base)[index];
  const u32 bits = static_cast<const u16*>(base)[index];
  return T == Type::bf16 ? as_float(bits << 16) : half_value(bits);
}
template <Type T>
JT_DEVICE u16 element16(float x) {
  return (u16)(T == Type::f16 ? half2(x, 0.f) : bfloat2(x, 0.f));
}
template <Type T>
JT_DEVICE void store_element(void* base, i64 index, float x) {
  if constexpr (T == Type::f32)
    static_cast<float*>(base)[index] = x;
  else
    static_cast<u16*>(base)[index] = element16<T>(x);
}

}  // namespace jt
