// Rows of one token and head: to and from float, Hadamard transform.
#pragma once
#include <cmath>

#include "half.h"
#include "kernels.h"

namespace jettison::JETTISON_TIER {

inline void load_row_floats(const Strided& x, int64_t token, int head, int size, float* row) {
  const int64_t at = token * x.token_stride + head * x.head_stride;
  if (x.dtype == Dtype::kFloat32) {
    const float* p = (const float*)x.data + at;
    for (int d = 0; d < size; d++) row[d] = p[d];
    return;
  }
  const uint16_t* p = (const uint16_t*)x.data + at;
  for (int d = 0; d < size; d += 16) fstore(row + d, x.dtype == Dtype::kBFloat16 ? load_bf16(p + d) : load_fp16(p + d));
}

inline void store_row_floats(const Strided& x, int64_t token, int head, int size, const float* row) {
  const int64_t at = token * x.token_stride + head * x.head_stride;
  if (x.dtype == Dtype::kFloat32) {
    float* p = (float*)x.data + at;
    for (int d = 0; d < size; d++) p[d] = row[d];
    return;
  }
  uint16_t* p = (uint16_t*)x.data + at;
  if (x.dtype == Dtype::kBFloat16)
    for (int d = 0; d < size; d++) p[d] = float_bf16(row[d]);
  else
    for (int d = 0; d < size; d++) p[d] = float_half(row[d]);
}

// Butterflies of one stride; the compiler vectorises strides of four and more.
template <int kStep>
inline void butterflies(float* row, int size) {
  for (int i = 0; i < size; i += 2 * kStep)
    for (int j = i; j < i + kStep; j++) {
      const float a = row[j], b = row[j + kStep];
      row[j] = a + b;
      row[j + kStep] = a - b;
    }
}

// Orthonormal block Hadamard, in place: largest power-of-two block that divides the size, strides from 1 upwards.
inline void hadamard(float* row, int size) {
  const int block = size & -size;
  if (block > 1) butterflies<1>(row, size);
  if (block > 2) butterflies<2>(row, size);
  if (block > 4) butterflies<4>(row, size);
  if (block > 8) butterflies<8>(row, size);
  if (block > 16) butterflies<16>(row, size);
  if (block > 32) butterflies<32>(row, size);
  if (block > 64) butterflies<64>(row, size);
  if (block > 128) butterflies<128>(row, size);
  const float scale = (float)(1.0 / std::sqrt((double)block));
  for (int d = 0; d < size; d++) row[d] *= scale;
}

}  // namespace jettison::JETTISON_TIER
