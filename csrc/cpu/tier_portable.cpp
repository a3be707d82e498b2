#define JETTISON_TIER portable
#include "simd_portable.h"

#include "attention.h"
#include "store.h"

namespace jettison {
extern const Tier kTierPortable{portable::store, portable::workspace_bytes, portable::attend, portable::merge};
}
