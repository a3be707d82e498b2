// One block of a kernel on the host: every thread is a fibre, a collective waits until its whole warp has come.
// Stands in for the machine-specific half of csrc/cuda/primitives.cuh. Slow and deterministic.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define JT_DEVICE inline
#define JT_KERNEL extern "C" void
#define JT_BOUNDS(threads, blocks)

namespace jt {

namespace simt {
struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  u32 parity = 0;
};
struct Gate {
  int arrived = 0;
  u64 generation = 0;
};
struct Warp {
  Gate gate;
  u32 slots[2][32][8];
};
struct Machine {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Gate whole;
  ucontext_t scheduler;
  std::vector<u8> shared;
  std::function<void()> body;
  int thread = 0, threads = 0, block = 0, blocks = 0;
};
inline Machine machine;

inline void yield() { swapcontext(&machine.fibres[machine.thread].context, &machine.scheduler); }
inline void wait(Gate& gate, int members) {
  const u64 generation = gate.generation;
  if (++gate.arrived == members) {
    gate.arrived = 0;
    gate.generation++;
    return;
  }
  while (gate.generation == generation) yield();
}
inline void enter() {
  machine.body();
  machine.fibres[machine.thread].done = true;
  yield();
}
inline Warp& warp() { return machine.warps[machine.thread / 32]; }
// Give `n` words to the warp, get the table of all lanes' words.
inline const u32 (*exchange(const u32* words, int n))[8] {
  u32& parity = machine.fibres[machine.thread].parity;
  auto& table = warp().slots[parity ^= 1];
  for (int i = 0; i < n; i++) table[machine.thread % 32][i] = words[i];
  wait(warp().gate, 32);
  return table;
}

inline void run_block(int block, int blocks, int threads, int shared_bytes, const std::function<void()>& body) {
  Machine& m = machine;
  m.threads = threads, m.block = block, m.blocks = blocks, m.body = body;
  m.whole = {};
  m.shared.assign(shared_bytes + 256, 0xa5);
  m.warps.assign(threads / 32, {});
  m.fibres.resize(threads);
  for (Fibre& f : m.fibres) {
    f.done = false, f.parity = 0;
    f.stack.resize(128 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (int alive = threads; alive;) {
    alive = 0;
    for (m.thread = 0; m.thread < threads; m.thread++)
      if (!m.fibres[m.thread].done) {
        swapcontext(&m.scheduler, &m.fibres[m.thread].context);
        alive += !m.fibres[m.thread].done;
      }
  }
}
}  // namespace simt

inline int thread() { return simt::machine.thread; }
inline int block() { return simt::machine.block; }
inline int blocks() { return simt::machine.blocks; }
inline int block_threads() { return simt::machine.threads; }
inline u8* shared_memory() { return (u8*)(((u64)simt::machine.shared.data() + 127) & ~127ull); }
inline void sync_warp() { simt::wait(simt::warp().gate, 32); }
inline void sync_block() { simt::wait(simt::machine.whole, simt::machine.threads); }
inline void publish() {}
inline u32 count_up(u32* counter, u32 last) {
  const u32 old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}

inline float as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline u32 as_bits(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float shuffle(float x, int lane) {
  const u32 bits = as_bits(x);
  return as_float(simt::exchange(&bits, 1)[lane & 31][0]);
}
inline float shuffle_xor(float x, int mask) {
  const u32 bits = as_bits(x);
  return as_float(simt::exchange(&bits, 1)[(thread() & 31) ^ mask][0]);
}
inline bool any(bool x) {
  const u32 bit = x;
  const auto table = simt::exchange(&bit, 1);
  u32 all = 0;
  for (int i = 0; i < 32; i++) all |= table[i][0];
  return all;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide(float a, float b) { return a / b; }
inline float times(float a, float b) { return a * b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float round_even(float x) { return std::nearbyint(x); }
inline float half_value(u32 x) {
  const _Float16* h = reinterpret_cast<const _Float16*>(&x);
  return (float)*h;
}
inline u32 half_bits(float x) {
  const _Float16 h = (_Float16)x;
  u16 y;
  std::memcpy(&y, &h, 2);
  return y;
}
inline u32 half2(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline u32 e4m3(float x) {
  const u32 sign = as_bits(x) >> 24 & 0x80;
  if (x != x) return 0x7f;
  const float a = std::fmin(std::fabs(x), 448.f);
  if (a < 0.015625f) return sign | (u32)std::nearbyint(a * 512.f);  // subnormal: steps of 2^-9
  int e;
  std::frexp(a, &e);
  return sign | (u32)((e + 6) * 8 + (int)std::nearbyint(std::ldexp(a, 4 - e)) - 8);
}
inline u32 e4m3x2(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
inline u32 half_towards(float x, bool up) {
  u32 y = half_bits(x);
  const float v = half_value(y);
  if (up ? v < x : v > x) {
    if ((y & 0x7fff) == 0) return up ? 1 : 0x8001;
    y += ((y >> 15) == (up ? 0u : 1u)) ? 1 : -1;
  }
  return y;
}
inline u32 half_down(float x) { return half_towards(x, false); }
inline u32 half_up(float x) { return half_towards(x, true); }
inline u32 bfloat_bits(float x) {
  const u32 b = as_bits(x);
  return x != x ? 0x7fffu : (b + 0x7fffu + (b >> 16 & 1)) >> 16;
}
inline u32 bfloat2(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }

template <bool BF16>
void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 words[6] = {a0, a1, a2, a3, b0, b1};
  const auto table = simt::exchange(words, 6);
  const int g = (thread() & 31) >> 2, t = thread() & 3;
  auto value = [](u32 word, int high) { return BF16 ? as_float(word >> 16 * high << 16) : half_value(word >> 16 * high); };
  for (int e = 0; e < 4; e++) {
    const int row = g + 8 * (e >> 1), column = 2 * t + (e & 1);
    float sum = d[e];
    for (int k = 0; k < 16; k++) {
      const u32* a = table[row % 8 * 4 + k % 8 / 2];
      const u32* b = table[column * 4 + k % 8 / 2];
      sum += value(a[row / 8 + 2 * (k / 8)], k & 1) * value(b[4 + k / 8], k & 1);
    }
    d[e] = sum;
  }
}
inline u32 transpose(u32 x) {
  const auto table = simt::exchange(&x, 1);
  const int g = (thread() & 31) >> 2, t = thread() & 3;
  auto element = [&](int row, int column) { return table[row * 4 + column / 2][0] >> 16 * (column & 1) & 0xffffu; };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

// A transaction barrier; the copies themselves are immediate, so a phase ends with its last arrival.
struct Policy {};
inline Policy read_once() { return {}; }
inline void barrier_init(u64* bar, int arrivals) { *bar = (u64)arrivals << 32 | (u64)arrivals << 16; }
inline void barrier_publish() {}
inline void barrier_expect(u64* bar, u32) {
  u64 left = (*bar >> 16 & 0xffff) - 1, phase = *bar & 1;
  if (left == 0) left = *bar >> 32, phase ^= 1;
  *bar = *bar >> 32 << 32 | left << 16 | phase;
}
inline void barrier_wait(u64* bar, u32 phase) {
  for (int k = 0; (*bar & 1) == phase; k++) {
    if (k > 100000) {
      std::fprintf(stderr, "a barrier was never completed: block %d thread %d\n", block(), thread());
      std::abort();
    }
    simt::yield();
  }
}
inline void bulk_copy(void* to, const void* from, u32 bytes, u64*, Policy) {
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16) {
    std::fprintf(stderr, "a bulk copy is not aligned to 16 bytes\n");
    std::abort();
  }
  std::memcpy(to, from, bytes);
}
inline void shared_before_bulk() {}
inline float load_fresh(const float* p) { return *p; }

}  // namespace jt
