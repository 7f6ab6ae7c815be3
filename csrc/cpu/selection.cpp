// Numbers become choices: match, mix, normalized and pool (scores), take (what a head keeps), merge_largest (what heads of all layers keep).
#include <algorithm>
#include <cmath>
#include <cstring>
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

static Tensor pool(Tensor attention, std::optional<Tensor> norm, int64_t kernel_size, bool largest) {
  STD_TORCH_CHECK(attention.dim() == 3 && attention.scalar_type() == ScalarType::Float, "attention must be float32 [B, Hkv, M]");
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1, "the kernel size must be odd, is ", kernel_size);
  attention = torch::stable::contiguous(attention);
  const int64_t sequences = attention.size(0) * attention.size(1), tokens = attention.size(2), reach = kernel_size / 2;
  Tensor out = torch::stable::new_empty(attention, {attention.size(0), attention.size(1), tokens}, ScalarType::Float);
  if (norm) {
    STD_TORCH_CHECK(norm->dim() == 3 && norm->scalar_type() == ScalarType::Float && norm->is_contiguous() &&
                        norm->size(0) == attention.size(0) && norm->size(1) == attention.size(1) && norm->size(2) >= tokens,
                    "norm must be contiguous float32 [B, Hkv, >= M]");
  }
  const int64_t norms = norm ? norm->size(2) : 0;
  std::vector<float> weighted(norm ? tokens : 0);
  float* to = data<float>(out);
  for (int64_t s = 0; s < sequences; ++s, to += tokens) {
    const float* from = data<float>(attention) + s * tokens;
    if (norm) {
      for (int64_t n = 0; n < tokens; ++n) weighted[n] = from[n] * data<float>(*norm)[s * norms + n];
      from = weighted.data();
    }
    // One neighbour of all tokens after the other: as many additions at once as a vector has lanes.
    std::fill_n(to, tokens, largest ? -std::numeric_limits<float>::infinity() : 0.0f);
    for (int64_t shift = -reach; shift <= reach; ++shift) {
      const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(tokens, tokens - shift);
      if (largest)
        for (int64_t n = begin; n < end; ++n) to[n] = from[n + shift] > to[n] || from[n + shift] != from[n + shift] ? from[n + shift] : to[n];
      else
        for (int64_t n = begin; n < end; ++n) to[n] += from[n + shift];
    }
    if (!largest)
      for (int64_t n = 0; n < tokens; ++n) to[n] /= float(kernel_size);
  }
  return out;
}

// Calls each(n) for the `wanted` largest of `size` numbers in order; of equal ones the first are taken.
template <class Each>
static void for_largest(const float* from, int64_t size, int64_t wanted, std::vector<float>& ordered, const Each& each) {
  if (wanted >= size) {
    for (int64_t n = 0; n < size; ++n) each(n);
    return;
  }
  if (wanted <= 0) return;
  ordered.resize(size);
  // Sorting needs an order, which nan has none in.
  std::transform(from, from + size, ordered.begin(), [](float x) { return x != x ? std::numeric_limits<float>::infinity() : x; });
  std::nth_element(ordered.begin(), ordered.begin() + (wanted - 1), ordered.end(), std::greater<float>());
  const float bound = ordered[wanted - 1];
  int64_t equal = wanted;
  for (int64_t n = 0; n < size; ++n) equal -= from[n] > bound;
  for (int64_t n = 0; n < size; ++n) {
    if (from[n] > bound) {
      each(n);
    } else if (from[n] == bound && equal > 0) {
      --equal;
      each(n);
    }
  }
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> merge_largest(Tensor value, Tensor owner, Tensor importance, Tensor within,
                                                                Tensor totals, int64_t owners) {
  STD_TORCH_CHECK(importance.dim() == 3 && importance.scalar_type() == ScalarType::Float, "importance must be float32 [B, Hkv, M]");
  const int64_t batch = importance.size(0), heads = importance.size(1), tokens = importance.size(2), added = heads * tokens;
  STD_TORCH_CHECK(value.dim() == 2 && value.scalar_type() == ScalarType::Float && value.size(0) == batch && owner.dim() == 2 &&
                      owner.scalar_type() == ScalarType::Int && owner.size(0) == batch && owner.size(1) == value.size(1),
                  "value must be float32 and owner int32, both [B, n]");
  for (const Tensor* counts : {&within, &totals})
    STD_TORCH_CHECK(counts->dim() == 1 && counts->scalar_type() == ScalarType::Long && counts->is_contiguous() && counts->numel() == batch,
                    "within and totals must be contiguous int64 [B] tensors");
  STD_TORCH_CHECK(owners >= heads, "there are ", heads, " heads and only ", owners, " owners");
  value = torch::stable::contiguous(value);
  owner = torch::stable::contiguous(owner);
  importance = torch::stable::contiguous(importance);
  const int64_t before = value.size(1), size = before + added;
  const int64_t *inside = data<int64_t>(within), *most = data<int64_t>(totals);
  int64_t kept = 0;
  for (int64_t b = 0; b < batch; ++b) kept = std::max(kept, most[b]);
  kept = std::min(kept, size);
  Tensor values = torch::stable::new_empty(value, {batch, kept}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(value, {batch, kept}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(within, {batch, owners}, ScalarType::Long);
  Tensor mine = torch::stable::new_empty(within, {batch, heads}, ScalarType::Long);
  std::fill_n(data<int64_t>(counts), batch * owners, 0);
  std::fill_n(data<int64_t>(mine), batch * heads, 0);
  const float lowest = -std::numeric_limits<float>::infinity();
  std::vector<float> all(size), ordered;
  std::vector<int32_t> whose(size);
  for (int64_t b = 0; b < batch; ++b) {
    const float* importances = data<float>(importance) + b * added;
    int64_t* own = data<int64_t>(mine) + b * heads;
    for_largest(importances, added, inside[b], ordered, [&](int64_t n) { own[n / tokens] += importances[n] != lowest; });
    std::copy_n(data<float>(value) + b * before, before, all.begin());
    std::copy_n(importances, added, all.begin() + before);
    std::copy_n(data<int32_t>(owner) + b * before, before, whose.begin());
    for (int64_t h = 0; h < heads; ++h) std::fill_n(whose.begin() + before + h * tokens, tokens, int32_t(owners - heads + h));
    float* to = data<float>(values) + b * kept;
    int32_t* to_owner = data<int32_t>(found) + b * kept;
    int64_t filled = 0;
    for_largest(all.data(), size, kept, ordered, [&](int64_t n) {
      to[filled] = all[n];
      to_owner[filled++] = whose[n];
    });
    // Where there is nan fewer are found.
    for (; filled < kept; ++filled) {
      to[filled] = lowest;
      to_owner[filled] = int32_t(owners - 1);
    }
    int64_t* count = data<int64_t>(counts) + b * owners;
    for_largest(to, kept, most[b], ordered, [&](int64_t n) {
      STD_TORCH_CHECK(to_owner[n] >= 0 && to_owner[n] < owners, "owner ", to_owner[n], " is not below ", owners);
      count[to_owner[n]] += to[n] != lowest;
    });
  }
  return {values, found, counts, mine};
}

// How many of the `totals` most important candidates of a batch row belong to each head, each weighted by the share of importance
// in its head's `base` most important.
static Tensor ada_counts(Tensor importance, Tensor base, Tensor totals) {
  STD_TORCH_CHECK(importance.dim() == 3 && importance.scalar_type() == ScalarType::Float, "importance must be float32 [B, Hkv, M]");
  const int64_t batch = importance.size(0), heads = importance.size(1), tokens = importance.size(2);
  for (const Tensor* counts : {&base, &totals})
    STD_TORCH_CHECK(counts->dim() == 1 && counts->scalar_type() == ScalarType::Long && counts->is_contiguous() && counts->numel() == batch,
                    "base and totals must be contiguous int64 [B] tensors");
  importance = torch::stable::contiguous(importance);
  Tensor out = torch::stable::new_empty(base, {batch, heads}, ScalarType::Long);
  std::fill_n(data<int64_t>(out), batch * heads, 0);
  std::vector<float> weighted(heads * tokens), ordered;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = data<float>(importance) + (b * heads + h) * tokens;
      float* to = weighted.data() + h * tokens;
      double whole = 0.0, top = 0.0;
      for (int64_t n = 0; n < tokens; ++n) whole += to[n] = from[n] < 0.0f ? 0.0f : from[n];
      for_largest(to, tokens, data<int64_t>(base)[b], ordered, [&](int64_t n) { top += to[n]; });
      const float concentration = float(top / std::max(whole, 1e-30));
      for (int64_t n = 0; n < tokens; ++n) to[n] = std::isinf(from[n]) && from[n] < 0.0f ? -1.0f : to[n] * concentration;
    }
    int64_t* count = data<int64_t>(out) + b * heads;
    for_largest(weighted.data(), heads * tokens, data<int64_t>(totals)[b], ordered, [&](int64_t n) { ++count[n / tokens]; });
  }
  return out;
}

// Sorts by radix: 11 bits of the keys at a time. Returns whether two numbers are equal, or one is nan: then the order is not known.
static bool places_of(const float* from, int64_t count, std::vector<uint32_t>& memory, int32_t* to) {
  constexpr int kBits = 11, kPasses = 3, kBuckets = 1 << kBits;
  memory.resize(4 * count + kPasses * kBuckets);
  uint32_t *keys = memory.data(), *other = keys + 2 * count, *starts = other + 2 * count;
  std::fill_n(starts, kPasses * kBuckets, 0u);
  for (int64_t n = 0; n < count; ++n) {
    if (from[n] != from[n]) return true;
    // Adding zero makes a negative zero positive.
    const float x = from[n] + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Smaller keys for larger numbers.
    bits = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
    keys[2 * n] = bits;
    keys[2 * n + 1] = uint32_t(n);
    for (int pass = 0; pass < kPasses; ++pass) ++starts[pass * kBuckets + (bits >> (pass * kBits)) % kBuckets];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t *start = starts + pass * kBuckets, before = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      const uint32_t size = start[bucket];
      start[bucket] = before;
      before += size;
    }
    for (int64_t n = 0; n < count; ++n) {
      const uint32_t at = start[(keys[2 * n] >> (pass * kBits)) % kBuckets]++;
      other[2 * at] = keys[2 * n];
      other[2 * at + 1] = keys[2 * n + 1];
    }
    std::swap(keys, other);
  }
  bool tied = false;
  for (int64_t n = 0; n < count; ++n) {
    to[keys[2 * n + 1]] = int32_t(n);
    tied |= n > 0 && keys[2 * n] == keys[2 * n - 2];
  }
  return tied;
}

static std::tuple<Tensor, Tensor> places(Tensor score) {
  STD_TORCH_CHECK(score.dim() == 3 && score.scalar_type() == ScalarType::Float, "score must be float32 [B, Hkv, M]");
  score = torch::stable::contiguous(score);
  const int64_t sequences = score.size(0) * score.size(1), tokens = score.size(2);
  Tensor out = torch::stable::new_empty(score, {score.size(0), score.size(1), tokens}, ScalarType::Int);
  Tensor tied = torch::stable::new_empty(score, {score.size(0), score.size(1)}, ScalarType::Bool);
  torch::stable::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> memory;
    for (int64_t s = begin; s < end; ++s)
      data<bool>(tied)[s] = places_of(data<float>(score) + s * tokens, tokens, memory, data<int32_t>(out) + s * tokens);
  });
  return {out, tied};
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("match", TORCH_BOX(&mixkv::cpu::match));
  m.impl("mix", TORCH_BOX(&mixkv::cpu::mix));
  m.impl("normalized", TORCH_BOX(&mixkv::cpu::normalized));
  m.impl("places", TORCH_BOX(&mixkv::cpu::places));
  m.impl("ada_counts", TORCH_BOX(&mixkv::cpu::ada_counts));
  m.impl("take", TORCH_BOX(&mixkv::cpu::take));
  m.impl("pool", TORCH_BOX(&mixkv::cpu::pool));
  m.impl("merge_largest", TORCH_BOX(&mixkv::cpu::merge_largest));
}
