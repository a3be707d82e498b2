// Which tier of CPU kernels this process uses.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace jettison {

int detect_tier() {
  int found = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found = 1;
  if (found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    found = 2;
#endif
  const char* wanted = std::getenv("JETTISON_ISA");
  if (wanted && !std::strcmp(wanted, "portable")) return 0;
  if (wanted && !std::strcmp(wanted, "avx2") && found > 1) return 1;
  return found;
}

const Tier& tier() {
#if defined(__x86_64__)
  static const Tier* const tiers[] = {&kTierPortable, &kTierAvx2, &kTierAvx512};
#else
  static const Tier* const tiers[] = {&kTierPortable};
#endif
  static const Tier& chosen = *tiers[detect_tier()];
  return chosen;
}

}  // namespace jettison
