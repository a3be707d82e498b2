// Which of sixteen lanes take part.
#pragma once
#include <cstdint>

namespace jettison::JETTISON_TIER {

using Mask = uint16_t;

// Lanes whose index i satisfies low <= i < high.
inline Mask lanes(int low, int high) {
  const uint32_t below_high = high >= 16 ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1;
  const uint32_t below_low = low >= 16 ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1;
  return (Mask)(below_high & ~below_low);
}

}  // namespace jettison::JETTISON_TIER
