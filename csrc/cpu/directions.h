// Rows by themselves: their norms, their mean direction, and their products with one vector. The lanes are elements of a row.
#pragma once

#include "simd.h"

namespace {

using mixkv::Rows;

// Rows summed by themselves before they are added to the total: long prompts lose no more to rounding than short ones.
constexpr int kSummed = 256;
constexpr int kMostLanes = 256 / kLanes;

// out[r] = product of row first + r with `other`, or with itself where that is null, for up to kLanes rows.
template <class T>
MIXKV_INLINE Vec row_products(const Rows& rows, int64_t first, int count, const float* other) {
  Vec total[kLanes] = {};
  for (int r = 0; r < count; ++r) {
    const T* row = (const T*)rows.data + (first + r) * rows.stride;
    for (int d = 0; d < rows.size; d += kLanes) {
      const Vec x = load(row + d);
      total[r] += x * (other == nullptr ? x : load(other + d));
    }
  }
  return sums(total);
}

MIXKV_INLINE int rows_left(const Rows& rows, int64_t first) {
  return rows.count - first < kLanes ? int(rows.count - first) : kLanes;
}

template <class T>
static void row_norms(const Rows& rows, float* out) {
  for (int64_t n = 0; n < rows.count; n += kLanes) {
    const int count = rows_left(rows, n);
    const Vec squares = row_products<T>(rows, n, count, nullptr);
    for (int r = 0; r < count; ++r) out[n + r] = __builtin_sqrtf(squares[r]);
  }
}

template <class T>
static int64_t mean_direction(const Rows& rows, float* inverse_norm, float* mean) {
  const int vectors = rows.size / kLanes;
  Vec total[kMostLanes] = {}, part[kMostLanes] = {};
  int64_t valid = 0;
  for (int64_t n = 0; n < rows.count; n += kLanes) {
    const int count = rows_left(rows, n);
    const Vec squares = row_products<T>(rows, n, count, nullptr);
    for (int r = 0; r < count; ++r) {
      const float norm = __builtin_sqrtf(squares[r]), scale = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
      inverse_norm[n + r] = scale;
      if (rows.valid != nullptr && !rows.valid[(n + r) * rows.valid_stride]) continue;
      const T* row = (const T*)rows.data + (n + r) * rows.stride;
      for (int v = 0; v < vectors; ++v) part[v] += load(row + v * kLanes) * scale;
      if (++valid % kSummed == 0) {
        for (int v = 0; v < vectors; ++v) {
          total[v] += part[v];
          part[v] = Vec{};
        }
      }
    }
  }
  const float count = valid > 0 ? float(valid) : 1.0f;
  for (int v = 0; v < vectors; ++v) store(mean + v * kLanes, (total[v] + part[v]) / count);
  return valid;
}

template <class T>
static void row_cosines(const Rows& rows, const float* direction, const float* inverse_norm, float* out) {
  for (int64_t n = 0; n < rows.count; n += kLanes) {
    const int count = rows_left(rows, n);
    const Vec products = row_products<T>(rows, n, count, direction);
    for (int r = 0; r < count; ++r) out[n + r] = products[r] * inverse_norm[n + r];
  }
}

}  // namespace
