// The best set of kernels for the chip at hand.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mixkv {

extern const Kernels table_baseline;

#if defined(__x86_64__)

extern const Kernels table_avx2;
extern const Kernels table_avx512;
extern const Kernels table_avx512_bf16;

static const Kernels& choose() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const Kernels* best = bf16 ? &table_avx512_bf16 : avx512 ? &table_avx512 : avx2 ? &table_avx2 : &table_baseline;
  // A lesser set can be asked for, to test it.
  if (const char* wanted = std::getenv("MIXKV_CPU")) {
    if (!std::strcmp(wanted, "baseline")) return table_baseline;
    if (!std::strcmp(wanted, "avx2") && avx2) return table_avx2;
    if (!std::strcmp(wanted, "avx512") && avx512) return table_avx512;
  }
  return *best;
}

#else

static const Kernels& choose() { return table_baseline; }

#endif

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mixkv
