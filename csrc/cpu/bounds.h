// Upper bounds of what a query's product with any key of a chunk can be, from the element-wise bounds of the chunk's keys: a
// query's positive elements meet the largest key elements, its negative ones the smallest.
#pragma once

#include "attend.h"

namespace {

using mixkv::Bounds;

template <class T, int Q>
static void bound_group(const typename QueryOf<T>::Type* query, const Bounds& bounds, bool fresh, float* out) {
  constexpr int R = kRows<Q>;
  const int size = 2 * bounds.size;
  for (int64_t n = 0; n < bounds.chunks; n += R) {
    const int count = bounds.chunks - n < R ? int(bounds.chunks - n) : R;
    const Vec x = dots<T, Q>(query, size, (const T*)bounds.of + n * size, size, count - 1);
    for (int r = 0; r < count; ++r) {
      float most = fresh ? x[r] : out[n + r];
      for (int i = 0; i < Q; ++i) most = x[i * R + r] > most ? x[i * R + r] : most;
      out[n + r] = most;
    }
  }
}

template <class T>
static void chunk_scores(const Bounds& bounds, float* out, float* scratch) {
  typedef typename QueryOf<T>::Type Query;
  const int size = bounds.size, padded = padded_size(2 * size);
  T* sides = (T*)scratch;
  Query* query = (Query*)(scratch + int64_t(kGroup) * 2 * size);
  for (int first = 0; first < bounds.count; first += kGroup) {
    const int count = bounds.count - first < kGroup ? bounds.count - first : kGroup;
    const void* rows[kGroup];
    for (int i = 0; i < count; ++i) {
      const T* from = (const T*)bounds.rows[first + i];
      T* to = sides + i * 2 * size;
      for (int d = 0; d < size; ++d) {
        const float x = get(from + d);
        put(to + d, x > 0.0f ? x : 0.0f);
        put(to + size + d, x < 0.0f ? x : 0.0f);
      }
      rows[i] = to;
    }
    prepare<T>({rows, count, 2 * size, 0, 1.0f, 0.0f}, query);
    if (count == 4) bound_group<T, 4>(query, bounds, first == 0, out);
    if (count == 3) bound_group<T, 3>(query, bounds, first == 0, out);
    if (count == 2) bound_group<T, 2>(query, bounds, first == 0, out);
    if (count == 1) bound_group<T, 1>(query, bounds, first == 0, out);
  }
}

static int64_t bounds_scratch(int size) { return int64_t(kGroup) * (2 * size + padded_size(2 * size)); }

}  // namespace
