// Norms of projected rows: the lanes of a vector are rows of the projection, and a value row is multiplied by broadcasting its
// elements, as in window.h. Nothing of the projected rows is stored.
#pragma once

#include "window.h"

namespace {

using mixkv::Projection;

constexpr int kOutputs = kMostVectors * kLanes;
// Value rows that stay in the first-level cache while all outputs are taken.
constexpr int kNormRows = 32;

MIXKV_INLINE int64_t output_blocks(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }

// Packs outputs first .. first + kOutputs (zeros beyond the last) as [D / kPerStep][kOutputs]. Returns the first step with an
// element that is not zero: of a triangular matrix nearly half is skipped.
template <class T>
static int pack_outputs(const Projection& projection, int64_t first, float* out) {
  constexpr int kStep = kPerStep<T>;
  const int steps = projection.size / kStep;
  int begin = steps;
  for (int i = 0; i < kOutputs; ++i) {
    const float* row = projection.factor + (first + i) * projection.size;
    for (int step = 0; step < steps; ++step) {
      float* to = out + step * kOutputs + i;
      *to = 0.0f;
      if (first + i >= projection.outputs) continue;
      if (step < begin)
        for (int d = 0; d < kStep; ++d)
          if (row[step * kStep + d] != 0.0f) begin = step;
      if constexpr (kStep == 1) {
        *to = row[step];
      } else {
        Bfloat16 pair[2];
        put(pair, row[2 * step]);
        put(pair + 1, row[2 * step + 1]);
        memcpy(to, pair, 4);
      }
    }
  }
  return begin;
}

template <class T>
static void projected_norm(const Projection& projection, float* out, float* scratch) {
  constexpr bool kAsStored = __is_same(T, float) || kPerStep<T> == 2;
  const int size = projection.size, steps = size / kPerStep<T>;
  const int64_t blocks = output_blocks(projection.outputs);
  float* packed = scratch;
  float* converted = packed + blocks * steps * kOutputs;
  float* begins = converted + int64_t(size) * kNormRows;
  for (int64_t block = 0; block < blocks; ++block)
    begins[block] = float(pack_outputs<T>(projection, block * kOutputs, packed + block * steps * kOutputs));

  for (int64_t n = 0; n < projection.rows; n += kNormRows) {
    const int count = projection.rows - n < kNormRows ? int(projection.rows - n) : kNormRows;
    const float* rows[kNormRows];
    for (int r = 0; r < kNormRows; ++r) {
      const T* value = (const T*)projection.value + (n + (r < count ? r : count - 1)) * projection.value_stride;
      if constexpr (kAsStored) {
        rows[r] = (const float*)value;
      } else {
        for (int d = 0; d < size; d += kLanes) store(converted + r * size + d, load(value + d));
        rows[r] = converted + r * size;
      }
    }
    // Values lie a token apart, which is further than the chip looks ahead by itself.
    for (int r = 0; r < kNormRows && n + kNormRows + r < projection.rows; ++r) {
      const char* next = (const char*)((const T*)projection.value + (n + kNormRows + r) * projection.value_stride);
      for (size_t byte = 0; byte < size * sizeof(T); byte += 64) __builtin_prefetch(next + byte);
    }
    Vec squares[kNormRows] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const int begin = int(begins[block]);
      for (int r = 0; r < count; r += kTokens) {
        const float* from[kTokens];
        for (int i = 0; i < kTokens; ++i) from[i] = rows[r + i] + begin;
        Vec total[kTokens][kMostVectors];
        multiply<T, kMostVectors>(packed + (block * steps + begin) * kOutputs, from, steps - begin, total);
        for (int i = 0; i < kTokens; ++i)
          for (int v = 0; v < kMostVectors; ++v) squares[r + i] += total[i][v] * total[i][v];
      }
    }
    for (int r = 0; r < count; r += kLanes) {
      const Vec x = sums(squares + r);
      for (int i = 0; i < kLanes && r + i < count; ++i) out[n + r + i] = __builtin_sqrtf(x[i]);
    }
  }
}

static int64_t norm_scratch(int64_t outputs, int size) {
  return output_blocks(outputs) * (int64_t(size) * kOutputs + 1) + int64_t(size) * kNormRows;
}

}  // namespace
