// Upper bounds of what a query's product with any key of a chunk can be, from the element-wise bounds of the chunk's keys: a
// query's positive elements meet the largest key elements, its negative ones the smallest.
#pragma once

#include "attend.h"

namespace {

using mixkv::Bounds;

// Levels of a chunk's largest elements, then of its smallest.
MIXKV_INLINE void unpack(const uint8_t* codes, int size, float* to) {
  for (int d = 0; d < size; d += kLanes) {
    ByteVec x;
    memcpy(&x, codes + d, sizeof x);
    store(to + d, __builtin_convertvector(__builtin_convertvector(x >> 4, IntVec), Vec));
    store(to + size + d, __builtin_convertvector(__builtin_convertvector(x & 15, IntVec), Vec));
  }
}

template <int Q>
static void bound_group(const float* query, const float* base, const Bounds& bounds, bool fresh, float* levels, float* out) {
  constexpr int R = kRows<Q>;
  const int size = 2 * bounds.size;
  for (int64_t n = 0; n < bounds.chunks; n += R) {
    const int count = bounds.chunks - n < R ? int(bounds.chunks - n) : R;
    for (int r = 0; r < count; ++r) unpack(bounds.codes + (n + r) * bounds.size, bounds.size, levels + r * size);
    const Vec x = dots<float, Q>(query, size, levels, size, count - 1);
    for (int r = 0; r < count; ++r) {
      float most = fresh ? base[0] + x[r] : out[n + r];
      for (int i = 0; i < Q; ++i) {
        const float bound = base[i] + x[i * R + r];
        most = bound > most ? bound : most;
      }
      out[n + r] = most;
    }
  }
}

template <class T>
static void chunk_scores(const Bounds& bounds, float* out, float* scratch) {
  const int size = bounds.size, padded = padded_size(2 * size);
  float *query = scratch, *levels = scratch + kGroup * padded;
  const float *lowest = bounds.grid, *step = bounds.grid + size;
  memset(query, 0, kGroup * padded * sizeof *query);
  for (int first = 0; first < bounds.count; first += kGroup) {
    const int count = bounds.count - first < kGroup ? bounds.count - first : kGroup;
    float base[kGroup] = {};
    for (int i = 0; i < count; ++i) {
      const T* from = (const T*)bounds.rows[first + i];
      float* to = query + i * padded;
      for (int d = 0; d < size; ++d) {
        const float x = get(from + d), scaled = x * step[d];
        base[i] += x * lowest[d];
        to[d] = scaled > 0.0f ? scaled : 0.0f;
        to[size + d] = scaled < 0.0f ? scaled : 0.0f;
      }
    }
    if (count == 4) bound_group<4>(query, base, bounds, first == 0, levels, out);
    if (count == 3) bound_group<3>(query, base, bounds, first == 0, levels, out);
    if (count == 2) bound_group<2>(query, base, bounds, first == 0, levels, out);
    if (count == 1) bound_group<1>(query, base, bounds, first == 0, levels, out);
  }
}

static int64_t bounds_scratch(int size) { return int64_t(kGroup) * padded_size(2 * size) + int64_t(kLanes) * 2 * size; }

}  // namespace
