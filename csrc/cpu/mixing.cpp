// match, mix, normalized: scores on one scale, head by head.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "store.h"

namespace mixkv::cpu {

// Scores of one head; null `valid`: all candidates are.
struct Candidates {
  int64_t tokens;
  const uint8_t* valid;
  int64_t stride;

  bool counts(int64_t n) const { return valid == nullptr || valid[n * stride]; }
};

static Candidates candidates_of(const std::optional<Tensor>& valid, int64_t s, int64_t heads, int64_t tokens) {
  if (!valid) return {tokens, nullptr, 0};
  return {tokens, data<uint8_t>(*valid) + s / heads * valid->stride(0) + s % heads * valid->stride(1), valid->stride(2)};
}

static double mean_of(const Candidates& all, const float* from) {
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t n = 0; n < all.tokens; ++n) {
    if (!all.counts(n)) continue;
    sum += from[n];
    ++count;
  }
  return sum / double(std::max<int64_t>(count, 1));
}

// Writes sign * from, min-max scaled, with the mean `target`.
static void match_head(const Candidates& all, const float* from, float sign, double target, float* to) {
  // A number that is not one stays in the bounds, as in torch.
  float low = std::numeric_limits<float>::infinity(), high = -low;
  for (int64_t n = 0; n < all.tokens; ++n) {
    if (!all.counts(n)) continue;
    const float x = sign * from[n];
    low = x < low || x != x ? x : low;
    high = x > high || x != x ? x : high;
  }
  const bool varies = high > low;
  const float range = high - low;
  for (int64_t n = 0; n < all.tokens; ++n) to[n] = varies && all.counts(n) ? (sign * from[n] - low) / range : 0.0f;
  const float mean = float(mean_of(all, to)), factor = mean > 0.0f ? float(target) / mean : 0.0f;
  for (int64_t n = 0; n < all.tokens; ++n) to[n] *= factor;
}

static void check_alike(const Tensor& one, const Tensor& other, const char* names) {
  STD_TORCH_CHECK(one.dim() == 3 && other.dim() == 3 && one.scalar_type() == ScalarType::Float && other.scalar_type() == ScalarType::Float &&
                      one.size(0) == other.size(0) && one.size(1) == other.size(1) && one.size(2) == other.size(2),
                  names, " must be float32 [B, Hkv, M] of one shape");
}

static Tensor match(Tensor raw, Tensor reference, std::optional<Tensor> valid) {
  check_alike(raw, reference, "raw and reference");
  raw = torch::stable::contiguous(raw);
  reference = torch::stable::contiguous(reference);
  const int64_t batch = raw.size(0), heads = raw.size(1), tokens = raw.size(2);
  if (valid) check_mask(*valid, batch, heads, tokens, "valid");
  Tensor out = torch::stable::new_empty(raw, {batch, heads, tokens}, ScalarType::Float);
  for (int64_t s = 0; s < batch * heads; ++s) {
    const Candidates all = candidates_of(valid, s, heads, tokens);
    const double target = mean_of(all, data<float>(reference) + s * tokens);
    match_head(all, data<float>(raw) + s * tokens, 1.0f, target, data<float>(out) + s * tokens);
  }
  return out;
}

static Tensor mix(Tensor importance, Tensor similarity, Tensor value_norm, Tensor share, std::optional<Tensor> valid) {
  check_alike(importance, similarity, "importance and similarity");
  check_alike(importance, value_norm, "importance and value_norm");
  const int64_t batch = importance.size(0), heads = importance.size(1), tokens = importance.size(2);
  STD_TORCH_CHECK(share.dim() == 2 && share.scalar_type() == ScalarType::Float && share.size(0) == batch && share.size(1) == heads,
                  "share must be float32 [B, Hkv]");
  if (valid) check_mask(*valid, batch, heads, tokens, "valid");
  for (Tensor* tensor : {&importance, &similarity, &value_norm, &share}) *tensor = torch::stable::contiguous(*tensor);
  Tensor out = torch::stable::new_empty(importance, {batch, heads, tokens}, ScalarType::Float);
  std::vector<float> size(tokens);
  for (int64_t s = 0; s < batch * heads; ++s) {
    const Candidates all = candidates_of(valid, s, heads, tokens);
    const float* from = data<float>(importance) + s * tokens;
    const float part = data<float>(share)[s], rest = 1.0f - part;
    const double target = mean_of(all, from);
    float* to = data<float>(out) + s * tokens;
    match_head(all, data<float>(similarity) + s * tokens, -1.0f, target, to);
    match_head(all, data<float>(value_norm) + s * tokens, 1.0f, target, size.data());
    for (int64_t n = 0; n < tokens; ++n) to[n] = part * to[n] + rest * (from[n] + size[n]);
  }
  return out;
}

static Tensor normalized(Tensor importance, double exponent) {
  STD_TORCH_CHECK(importance.dim() == 3 && importance.scalar_type() == ScalarType::Float, "importance must be float32 [B, Hkv, M]");
  importance = torch::stable::contiguous(importance);
  const int64_t batch = importance.size(0), count = importance.size(1) * importance.size(2);
  Tensor out = torch::stable::new_empty(importance, {batch, importance.size(1), importance.size(2)}, ScalarType::Float);
  for (int64_t b = 0; b < batch; ++b) {
    const float* from = data<float>(importance) + b * count;
    float* to = data<float>(out) + b * count;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t n = 0; n < count; ++n) largest = from[n] > largest || from[n] != from[n] ? from[n] : largest;
    const float divisor = largest > 0.0f ? std::pow(largest, float(exponent)) : 1.0f;
    for (int64_t n = 0; n < count; ++n) to[n] = from[n] / divisor;
  }
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("match", TORCH_BOX(&mixkv::cpu::match));
  m.impl("mix", TORCH_BOX(&mixkv::cpu::mix));
  m.impl("normalized", TORCH_BOX(&mixkv::cpu::normalized));
}
