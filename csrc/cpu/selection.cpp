// Numbers become choices: match (scores on one scale), take and rows_below (what a head keeps, by rank), largest.
#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "store.h"

namespace mixkv::cpu {

static void check_mask(const Tensor& mask, int64_t batch, int64_t heads, int64_t tokens, const char* name) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 3 && mask.size(0) == batch && mask.size(1) == heads &&
                      mask.size(2) == tokens,
                  name, " must be a bool [B, Hkv, tokens] tensor");
}

static Tensor match(Tensor raw, Tensor reference, std::optional<Tensor> valid) {
  STD_TORCH_CHECK(raw.dim() == 3 && raw.scalar_type() == ScalarType::Float && reference.scalar_type() == ScalarType::Float,
                  "raw and reference must be float32 [B, Hkv, M]");
  raw = torch::stable::contiguous(raw);
  reference = torch::stable::contiguous(reference);
  const int64_t batch = raw.size(0), heads = raw.size(1), tokens = raw.size(2);
  STD_TORCH_CHECK(reference.dim() == 3 && reference.size(0) == batch && reference.size(1) == heads && reference.size(2) == tokens,
                  "raw and reference must have one shape");
  if (valid) check_mask(*valid, batch, heads, tokens, "valid");
  Tensor out = torch::stable::new_empty(raw, {batch, heads, tokens}, ScalarType::Float);
  const float *from = data<float>(raw), *like = data<float>(reference);
  float* to = data<float>(out);
  for (int64_t s = 0; s < batch * heads; ++s, from += tokens, like += tokens, to += tokens) {
    const uint8_t* real = valid ? data<uint8_t>(*valid) + s / heads * valid->stride(0) + s % heads * valid->stride(1) : nullptr;
    const int64_t stride = valid ? valid->stride(2) : 0;
    const auto counts = [&](int64_t n) { return real == nullptr || real[n * stride]; };
    // A number that is not one stays in the bounds, as in torch.
    float low = std::numeric_limits<float>::infinity(), high = -low;
    int64_t count = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      if (!counts(n)) continue;
      const float x = from[n];
      low = x < low || x != x ? x : low;
      high = x > high || x != x ? x : high;
      ++count;
    }
    const bool varies = high > low;
    const float range = high - low;
    double sum = 0.0, target = 0.0;
    for (int64_t n = 0; n < tokens; ++n) {
      const bool here = counts(n);
      to[n] = here && varies ? (from[n] - low) / range : 0.0f;
      if (!here) continue;
      sum += to[n];
      target += like[n];
    }
    const double divisor = double(std::max<int64_t>(count, 1));
    const float mean = float(sum / divisor), factor = mean > 0.0f ? float(target / divisor) / mean : 0.0f;
    for (int64_t n = 0; n < tokens; ++n) to[n] *= factor;
  }
  return out;
}

static std::tuple<Tensor, Tensor, Tensor> take(Tensor ranks, Tensor entries, std::optional<Tensor> window, int64_t width) {
  STD_TORCH_CHECK(ranks.dim() == 3 && ranks.scalar_type() == ScalarType::Int, "ranks must be int32 [B, Hkv, M]");
  const int64_t batch = ranks.size(0), heads = ranks.size(1), tokens = ranks.size(2), sequences = batch * heads;
  STD_TORCH_CHECK(entries.dim() == 2 && entries.scalar_type() == ScalarType::Long && entries.size(0) == batch && entries.size(1) == heads,
                  "entries must be int64 [B, Hkv]");
  STD_TORCH_CHECK(width >= 0, "the window cannot be negative");
  if (window) check_mask(*window, batch, heads, width, "window");
  ranks = torch::stable::contiguous(ranks);
  entries = torch::stable::contiguous(entries);
  Tensor lengths = torch::stable::new_empty(entries, {batch, heads}, ScalarType::Long);
  const int32_t* rank = data<int32_t>(ranks);
  const int64_t* most = data<int64_t>(entries);
  int64_t* counts = data<int64_t>(lengths);
  const auto sees = [&](int64_t s, int64_t w) {
    if (!window) return true;
    return bool(data<uint8_t>(*window)[s / heads * window->stride(0) + s % heads * window->stride(1) + w * window->stride(2)]);
  };
  int64_t total = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t count = 0;
    for (int64_t n = 0; n < tokens; ++n) count += rank[s * tokens + n] < most[s];
    for (int64_t w = 0; w < width; ++w) count += sees(s, w);
    counts[s] = count;
    total += count;
  }
  Tensor positions = torch::stable::new_empty(ranks, {total}, ScalarType::Int);
  Tensor taken = torch::stable::new_empty(ranks, {total}, ScalarType::Int);
  int32_t *position = data<int32_t>(positions), *place = data<int32_t>(taken);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t n = 0; n < tokens; ++n) {
      const int32_t x = rank[s * tokens + n];
      if (x >= most[s]) continue;
      *position++ = int32_t(n);
      *place++ = x;
    }
    for (int64_t w = 0; w < width; ++w) {
      if (!sees(s, w)) continue;
      *position++ = int32_t(tokens + w);
      *place++ = -1;
    }
  }
  return {positions, taken, lengths};
}

static std::tuple<Tensor, Tensor, Tensor> rows_below(Tensor starts, Tensor lengths, Tensor ranks, Tensor quota, int64_t tail) {
  check_ints(starts, -1, "starts");
  const int64_t sequences = starts.numel(), selected = ranks.numel();
  check_ints(lengths, sequences, "lengths");
  check_ints(ranks, -1, "ranks");
  STD_TORCH_CHECK(quota.dim() == 1 && quota.scalar_type() == ScalarType::Long && quota.is_contiguous() && quota.numel() == sequences,
                  "quota must be a contiguous int64 vector with an entry for every sequence");
  const int32_t *first = data<int32_t>(starts), *held = data<int32_t>(lengths), *rank = data<int32_t>(ranks);
  const int64_t* most = data<int64_t>(quota);
  int64_t candidates = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    STD_TORCH_CHECK(tail >= 0 && held[s] >= tail, "sequence ", s, " has ", held[s], " rows, fewer than the tail of ", tail);
    candidates += held[s] - tail;
  }
  STD_TORCH_CHECK(candidates == selected, "there are ", selected, " ranks for ", candidates, " selected rows");
  Tensor counts = torch::stable::new_empty(quota, {sequences}, ScalarType::Long);
  int64_t* count = data<int64_t>(counts);
  int64_t left = 0;
  for (int64_t s = 0, i = 0; s < sequences; ++s) {
    int64_t found = 0;
    for (int64_t n = 0; n < held[s] - tail; ++n, ++i) found += rank[i] < most[s];
    count[s] = found + tail;
    left += found;
  }
  Tensor rows = torch::stable::new_empty(ranks, {left + sequences * tail}, ScalarType::Int);
  Tensor remaining = torch::stable::new_empty(ranks, {left}, ScalarType::Int);
  int32_t *row = data<int32_t>(rows), *place = data<int32_t>(remaining);
  for (int64_t s = 0, i = 0; s < sequences; ++s) {
    const int64_t chosen = held[s] - tail;
    for (int64_t n = 0; n < chosen; ++n, ++i) {
      if (rank[i] >= most[s]) continue;
      *row++ = int32_t(first[s] + n);
      *place++ = rank[i];
    }
    for (int64_t n = chosen; n < held[s]; ++n) *row++ = int32_t(first[s] + n);
  }
  return {rows, counts, remaining};
}

// The `counts` largest of each row; of equal ones, the first.
static Tensor largest(Tensor value, Tensor counts) {
  STD_TORCH_CHECK(value.dim() == 2 && value.scalar_type() == ScalarType::Float, "value must be float32 [B, n]");
  const int64_t batch = value.size(0), size = value.size(1);
  STD_TORCH_CHECK(counts.dim() == 1 && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.numel() == batch,
                  "counts must be a contiguous int64 [B] tensor");
  value = torch::stable::contiguous(value);
  Tensor out = torch::stable::new_empty(value, {batch, size}, ScalarType::Bool);
  const float* from = data<float>(value);
  bool* to = data<bool>(out);
  std::vector<float> ordered(size);
  for (int64_t b = 0; b < batch; ++b, from += size, to += size) {
    const int64_t wanted = data<int64_t>(counts)[b];
    if (wanted >= size || wanted <= 0) {
      std::fill_n(to, size, wanted > 0);
      continue;
    }
    // Sorting needs an order, which nan has none in.
    std::transform(from, from + size, ordered.begin(), [](float x) { return x != x ? std::numeric_limits<float>::infinity() : x; });
    std::nth_element(ordered.begin(), ordered.begin() + (wanted - 1), ordered.end(), std::greater<float>());
    const float bound = ordered[wanted - 1];
    int64_t equal = wanted;
    for (int64_t n = 0; n < size; ++n) equal -= from[n] > bound;
    for (int64_t n = 0; n < size; ++n) {
      const bool tied = from[n] == bound && equal > 0;
      equal -= tied;
      to[n] = from[n] > bound || tied;
    }
  }
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("match", TORCH_BOX(&mixkv::cpu::match));
  m.impl("take", TORCH_BOX(&mixkv::cpu::take));
  m.impl("rows_below", TORCH_BOX(&mixkv::cpu::rows_below));
  m.impl("largest", TORCH_BOX(&mixkv::cpu::largest));
}
