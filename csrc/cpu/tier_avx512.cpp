#define JETTISON_TIER avx512
#include "simd_avx512.h"

#include "attention.h"
#include "store.h"

namespace jettison {
extern const Tier kTierAvx512{avx512::store, avx512::workspace_bytes, avx512::attend, avx512::merge};
}
