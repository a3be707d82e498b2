#define JETTISON_TIER avx2
#include "simd_avx2.h"

#include "attention.h"
#include "store.h"

namespace jettison {
extern const Tier kTierAvx2{avx2::store, avx2::workspace_bytes, avx2::attend, avx2::merge};
}
