// The arithmetic of a softmax in powers of two.
#pragma once

#include "instructions.cuh"

namespace mixkv::cuda {

constexpr float kLog2e = 1.44269504f;

__device__ inline float negative_infinity() { return __int_as_float(0xff800000); }

// exp2(x - base); what is hidden, or has seen nothing, is -infinity and weighs nothing.
__device__ inline float share(float x, float base) { return x == negative_infinity() ? 0.0f : power_of_two(x - base); }

// The factor that makes a sum of values with this maximum and mass the attention's output.
__device__ inline float normalizer(float highest, float mass, const float* sink) {
  if (highest == negative_infinity()) return 0.0f;
  if (sink == nullptr) return 1.0f / mass;
  const float logit = *sink * kLog2e, base = fmaxf(highest, logit), factor = power_of_two(highest - base);
  return factor / (mass * factor + power_of_two(logit - base));
}

__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// A logit as the softmax takes it: scaled, capped, as a power of two.
struct Scale {
  float scaling, softcap;

  __device__ float operator()(float x) const {
    x *= scaling;
    if (softcap != 0.0f) x = softcap * tanhf(x / softcap);
    return x * kLog2e;
  }
};

}  // namespace mixkv::cuda
