// Scores of one tile: query rows against 16 packed keys.
//
// Below 16 bits the query is a 16-bit integer vector and a score is sum(q * code), exact in 32 bits; the key's scale
// and zero are applied to the score. At 16 bits the arithmetic is float.
#pragma once
#include "rows.h"

namespace jettison::JETTISON_TIER {

constexpr float kWeightMax = 32767.f;  // 15-bit queries and weights

// Integers per unit of a row whose largest magnitude is `most`; rows that are as good as zero become zero.
inline float integers_per_unit(float most) { return most > 1e-30f ? kWeightMax / most : 0.f; }

constexpr int kRowGroup = 4;  // query rows that share one pass over the packed bytes

enum class Raw16 { kBFloat16, kFloat16 };

// Sub-vectors that a 32-bit word yields: pairs of codes for dot2, or single floats.
template <int kBits>
constexpr int kFields = kBits == 16 ? 2 : 16 / kBits;
template <int kBits>
constexpr uint32_t kPairMask = ((1u << kBits) - 1) * 0x10001u;

template <int kBits, Raw16 kRaw>
struct KeyMath {
  using Acc = I;
  using Operand = int32_t;
  static Acc zero() { return izero(); }
  template <int kField>
  static I unpack(I x) {
    return field<kField * kBits, kPairMask<kBits>>(x);
  }
  static Acc step(Acc acc, I codes, I query) { return dot2(acc, codes, query); }
};
template <Raw16 kRaw>
struct KeyMath<16, kRaw> {
  using Acc = F;
  using Operand = float;
  static Acc zero() { return fzero(); }
  template <int kField>
  static F unpack(I x) {
    if constexpr (kRaw == Raw16::kBFloat16) return kField ? bf16_high(x) : bf16_low(x);
    else return kField ? fp16_high(x) : fp16_low(x);
  }
  static Acc step(Acc acc, F key, F query) { return fma(key, query, acc); }
};

// Number of 16-byte columns of a key row, planes padded separately.
inline int key_columns(const Page& page) {
  const int row = page.key_row_bytes();
  return row / 64 * 4 + (row % 64 + 15) / 16;
}

// The query as the operand of every (column, field): [columns][fields][4 words]. `q` holds D (+ padding to whole
// words' channels) int16 or floats in channel order.
template <int kBits, class T, class Word>
inline void arrange_query(const T* q, const Page& page, Word* out) {
  constexpr int kPerWord = 32 / kBits, kCount = kFields<kBits>;
  const int row = page.key_row_bytes();
  for (int plane = 0; plane < row; plane += 64)
    for (int byte = plane; byte < row && byte < plane + 64; byte += 16)
      for (int f = 0; f < kCount; f++)
        for (int w = 0; w < 4; w++, out++) {
          const int channel = (byte + 4 * w) / 4 * kPerWord;
          if (byte + 4 * w >= row) *out = 0;
          else if constexpr (kBits == 16) *out = q[channel + f];
          else *out = (Word)((uint16_t)q[channel + f] | (uint32_t)(uint16_t)q[channel + kPerWord / 2 + f] << 16);
        }
}

template <class Math, int kField, int kCount, int kRows, class Acc, class Operand>
inline void accumulate(const I* quads, const Operand* query, int64_t row_stride, Acc (*acc)[4]) {
  if constexpr (kField < kCount) {
    decltype(Math::template unpack<kField>(quads[0])) key[4];
    for (int a = 0; a < 4; a++) key[a] = Math::template unpack<kField>(quads[a]);
    for (int m = 0; m < kRows; m++) {
      const auto q = bcast4(query + m * row_stride + 4 * kField);
      for (int a = 0; a < 4; a++) acc[m][a] = Math::step(acc[m][a], key[a], q);
    }
    accumulate<Math, kField + 1, kCount, kRows>(quads, query, row_stride, acc);
  }
}

// sums[m] = the 16 scores of row m. `query` is arranged, rows `row_stride` apart.
template <int kBits, Raw16 kRaw, int kRows>
inline void tile_scores(const uint8_t* tile, int row, const typename KeyMath<kBits, kRaw>::Operand* query,
                        int64_t row_stride, typename KeyMath<kBits, kRaw>::Acc* sums) {
  using Math = KeyMath<kBits, kRaw>;
  typename Math::Acc acc[kRows][4];
  for (auto& quads : acc)
    for (auto& x : quads) x = Math::zero();
  const auto step = [&](const I* quads, int column) {
    accumulate<Math, 0, kFields<kBits>, kRows>(quads, query + 4 * kFields<kBits> * column, row_stride, acc);
  };
  for (int plane = 0; plane < row; plane += 64, tile += 64 * kTile) {
    const int width = row - plane < 64 ? row - plane : 64;
    if (width == 64) {
      // Two columns at a time: four would need more registers than there are.
      for (int odd = 0; odd < 2; odd++) {
        I columns[4][2];
        for (int a = 0; a < 4; a++) load_rows64(tile + 256 * a, odd, columns[a]);
        for (int c = 0; c < 2; c++) {
          const I quads[4] = {columns[0][c], columns[1][c], columns[2][c], columns[3][c]};
          step(quads, odd + 2 * c);
        }
      }
      query += 16 * kFields<kBits>;
    } else if (width == 32) {
      I columns[4][2];
      for (int a = 0; a < 4; a++) load_rows32(tile + 128 * a, columns[a]);
      for (int c = 0; c < 2; c++) {
        const I quads[4] = {columns[0][c], columns[1][c], columns[2][c], columns[3][c]};
        step(quads, c);
      }
      query += 8 * kFields<kBits>;
    } else {
      for (int c = 0; c < width; c += 16, query += 4 * kFields<kBits>) {
        const int n = width - c < 16 ? width - c : 16;
        I quads[4];
        for (int a = 0; a < 4; a++) quads[a] = load_rows(tile + 4 * a * width + c, width, n);
        step(quads, 0);
      }
    }
  }
  for (int m = 0; m < kRows; m++) sums[m] = reduce_quads(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

}  // namespace jettison::JETTISON_TIER
