// What heads keep: places (candidates in order), ada_counts, take, merge_largest (over the layers so far).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "store.h"

namespace mixkv::cpu {

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

// The bits of a number in an order that has larger numbers first; nan is the largest.
static uint32_t descending(float x) {
  // Adding zero makes a negative zero positive.
  x = x != x ? std::numeric_limits<float>::infinity() : x + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

static float from_descending(uint32_t bits) {
  bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The `wanted`-th largest of `size` numbers, 1 <= wanted <= size: counted by their first bits, then sorted among their like.
static float bound_of(const float* from, int64_t size, int64_t wanted, std::vector<uint32_t>& memory) {
  constexpr int kShift = 21, kBuckets = 1 << (32 - kShift);
  memory.assign(kBuckets, 0u);
  for (int64_t n = 0; n < size; ++n) ++memory[descending(from[n]) >> kShift];
  uint32_t bucket = 0;
  for (; int64_t(memory[bucket]) < wanted; ++bucket) wanted -= memory[bucket];
  memory.clear();
  for (int64_t n = 0; n < size; ++n) {
    const uint32_t bits = descending(from[n]);
    if (bits >> kShift == bucket) memory.push_back(bits);
  }
  std::nth_element(memory.begin(), memory.begin() + (wanted - 1), memory.end());
  return from_descending(memory[wanted - 1]);
}

// Calls each(n) for the `wanted` largest of `size` numbers in order; of equal ones the first are taken.
template <class Each>
static void for_largest(const float* from, int64_t size, int64_t wanted, std::vector<uint32_t>& memory, const Each& each) {
  if (wanted >= size) {
    for (int64_t n = 0; n < size; ++n) each(n);
    return;
  }
  if (wanted <= 0) return;
  const float bound = bound_of(from, size, wanted, memory);
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

// `selection_reference.LEAST_UNIT`.
constexpr double kLeastUnit = 1 << 20;

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_largest(Tensor value, Tensor owner, Tensor within, Tensor importance,
                                                                        Tensor own_totals, Tensor totals, Tensor base, Tensor candidates,
                                                                        Tensor least, Tensor limit, double floor) {
  STD_TORCH_CHECK(importance.dim() == 3 && importance.scalar_type() == ScalarType::Float, "importance must be float32 [B, Hkv, M]");
  const int64_t batch = importance.size(0), heads = importance.size(1), tokens = importance.size(2), added = heads * tokens;
  STD_TORCH_CHECK(value.dim() == 2 && value.scalar_type() == ScalarType::Float && value.size(0) == batch && owner.dim() == 2 &&
                      owner.scalar_type() == ScalarType::Int && owner.size(0) == batch && owner.size(1) == value.size(1),
                  "value must be float32 and owner int32, both [B, n]");
  for (const Tensor* counts : {&own_totals, &totals, &base, &candidates})
    STD_TORCH_CHECK(counts->dim() == 1 && counts->scalar_type() == ScalarType::Long && counts->is_contiguous() && counts->numel() == batch,
                    "own_totals, totals, base and candidates must be contiguous int64 [B] tensors");
  STD_TORCH_CHECK(within.dim() == 2 && within.scalar_type() == ScalarType::Long && within.is_contiguous() && within.size(0) == batch &&
                      heads > 0 && within.size(1) % heads == 0,
                  "within must be a contiguous int64 [B, heads before] tensor");
  for (const Tensor* shares : {&least, &limit})
    STD_TORCH_CHECK(shares->dim() == 2 && shares->scalar_type() == ScalarType::Long && shares->is_contiguous() && shares->size(0) == batch &&
                        shares->size(1) >= within.size(1) + heads,
                    "least and limit must be contiguous int64 [B, heads of all layers] tensors");
  const int64_t earlier = within.size(1), owners = earlier + heads;
  value = torch::stable::contiguous(value);
  owner = torch::stable::contiguous(owner);
  importance = torch::stable::contiguous(importance);
  const int64_t before = value.size(1), size = before + added;
  const int64_t *inside = data<int64_t>(own_totals), *most = data<int64_t>(totals);
  int64_t kept = 0;
  for (int64_t b = 0; b < batch; ++b) kept = std::max(kept, most[b]);
  kept = std::min(kept, size);
  Tensor values = torch::stable::new_empty(value, {batch, kept}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(value, {batch, kept}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(within, {batch, owners}, ScalarType::Long);
  Tensor all_within = torch::stable::new_empty(within, {batch, owners}, ScalarType::Long);
  Tensor bounds = torch::stable::new_empty(within, {batch, owners}, ScalarType::Long);
  std::fill_n(data<int64_t>(counts), batch * owners, 0);
  std::fill_n(data<int64_t>(all_within), batch * owners, 0);
  const float lowest = -std::numeric_limits<float>::infinity();
  std::vector<float> all(size);
  std::vector<uint32_t> memory;
  std::vector<int32_t> whose(size);
  for (int64_t b = 0; b < batch; ++b) {
    const float* importances = data<float>(importance) + b * added;
    int64_t* own = data<int64_t>(all_within) + b * owners;
    std::copy_n(data<int64_t>(within) + b * earlier, earlier, own);
    for_largest(importances, added, inside[b], memory, [&](int64_t n) { own[earlier + n / tokens] += importances[n] != lowest; });
    std::copy_n(data<float>(value) + b * before, before, all.begin());
    std::copy_n(importances, added, all.begin() + before);
    std::copy_n(data<int32_t>(owner) + b * before, before, whose.begin());
    for (int64_t h = 0; h < heads; ++h) std::fill_n(whose.begin() + before + h * tokens, tokens, int32_t(earlier + h));
    float* to = data<float>(values) + b * kept;
    int32_t* to_owner = data<int32_t>(found) + b * kept;
    int64_t filled = 0;
    for_largest(all.data(), size, kept, memory, [&](int64_t n) {
      to[filled] = all[n];
      to_owner[filled++] = whose[n];
    });
    // Where there is nan fewer are found.
    for (; filled < kept; ++filled) {
      to[filled] = lowest;
      to_owner[filled] = int32_t(owners - 1);
    }
    int64_t* count = data<int64_t>(counts) + b * owners;
    for_largest(to, kept, most[b], memory, [&](int64_t n) {
      STD_TORCH_CHECK(to_owner[n] >= 0 && to_owner[n] < owners, "owner ", to_owner[n], " is not below ", owners);
      count[to_owner[n]] += to[n] != lowest;
    });
    const int64_t mean = data<int64_t>(base)[b], longest = data<int64_t>(candidates)[b];
    const int64_t *certain = data<int64_t>(least) + b * least.size(1), *most_rows = data<int64_t>(limit) + b * limit.size(1);
    const double scale = (1.0 - floor) / double(std::max<int64_t>(longest, 1));
    for (int64_t i = 0; i < owners; ++i) {
      const double share = scale * double((longest - mean) * count[i] + mean * own[i]) + double(certain[i]) / kLeastUnit + 2e-6;
      data<int64_t>(bounds)[b * owners + i] = std::min(int64_t(share) + 1, most_rows[i]);
    }
  }
  return {values, found, counts, all_within, bounds};
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
  std::vector<float> weighted(heads * tokens);
  std::vector<uint32_t> memory;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = data<float>(importance) + (b * heads + h) * tokens;
      float* to = weighted.data() + h * tokens;
      double whole = 0.0, top = 0.0;
      for (int64_t n = 0; n < tokens; ++n) whole += to[n] = from[n] < 0.0f ? 0.0f : from[n];
      for_largest(to, tokens, data<int64_t>(base)[b], memory, [&](int64_t n) { top += to[n]; });
      const float concentration = float(top / std::max(whole, 1e-30));
      for (int64_t n = 0; n < tokens; ++n) to[n] = std::isinf(from[n]) && from[n] < 0.0f ? -1.0f : to[n] * concentration;
    }
    int64_t* count = data<int64_t>(out) + b * heads;
    for_largest(weighted.data(), heads * tokens, data<int64_t>(totals)[b], memory, [&](int64_t n) { ++count[n / tokens]; });
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
    const uint32_t bits = descending(from[n]);
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
  m.impl("places", TORCH_BOX(&mixkv::cpu::places));
  m.impl("ada_counts", TORCH_BOX(&mixkv::cpu::ada_counts));
  m.impl("take", TORCH_BOX(&mixkv::cpu::take));
  m.impl("merge_largest", TORCH_BOX(&mixkv::cpu::merge_largest));
}
