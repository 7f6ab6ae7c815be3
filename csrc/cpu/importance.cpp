// importance: what the observation window attends to, pooled, alone or times the norm of what it takes.
#include "importance.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "store.h"

namespace mixkv::cpu {

// to = the largest or the sum of the `reach` neighbours on both sides of each of the tokens, and itself.
static void pool(const float* from, int64_t tokens, int64_t reach, bool largest, float* to) {
  // One neighbour of all tokens after the other: as many additions at once as a vector has lanes.
  std::fill_n(to, tokens, largest ? -std::numeric_limits<float>::infinity() : 0.0f);
  for (int64_t shift = -reach; shift <= reach; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(tokens, tokens - shift);
    if (largest)
      for (int64_t n = begin; n < end; ++n) to[n] = from[n + shift] > to[n] || from[n + shift] != from[n + shift] ? from[n + shift] : to[n];
    else
      for (int64_t n = begin; n < end; ++n) to[n] += from[n + shift];
  }
}

static Tensor importance(Tensor query, Tensor key, std::optional<Tensor> value, std::optional<Tensor> factor, std::optional<Tensor> valid,
                         double scaling, bool reduce_max, double softcap, std::optional<Tensor> sinks, int64_t kernel_size, bool largest) {
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1, "the kernel size must be odd, is ", kernel_size);
  if (value) {
    STD_TORCH_CHECK(value->dim() == 4 && key.dim() == 4, "key and value must be [B, Hkv, N, D]");
    for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(value->size(d) == key.size(d), "key and value must agree in all but their last dimension");
  }
  const Tensor attention = window_scores(query, key, valid, scaling, bool(value), reduce_max, softcap, sinks);
  const int64_t sequences = attention.size(0) * attention.size(1), tokens = attention.size(2);
  Tensor out = torch::stable::new_empty(attention, {attention.size(0), attention.size(1), tokens}, ScalarType::Float);
  if (tokens == 0) return out;
  std::optional<Tensor> norm;
  if (value) norm = factor ? projected_norm(*value, *factor) : row_norms(*value);
  std::vector<float> weighted(value ? tokens : 0);
  for (int64_t s = 0; s < sequences; ++s) {
    const float* from = data<float>(attention) + s * tokens;
    float* to = data<float>(out) + s * tokens;
    if (norm) {
      const float* norms = data<float>(*norm) + s * norm->size(2);
      for (int64_t n = 0; n < tokens; ++n) weighted[n] = from[n] * norms[n];
      from = weighted.data();
    }
    pool(from, tokens, kernel_size / 2, largest, to);
    if (!largest)
      for (int64_t n = 0; n < tokens; ++n) to[n] /= float(kernel_size);
  }
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) { m.impl("importance", TORCH_BOX(&mixkv::cpu::importance)); }
