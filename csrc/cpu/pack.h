// Rotation of rows and their codes of 4 bits: `rotated` and `packed` of mixkv.ops.row_codes.
#pragma once

#include <math.h>

#include "levels.h"
#include "simd.h"

namespace {

MIXKV_INLINE float sign_of(uint64_t index) { return index * index * 2654435761u >> 13 & 1 ? 1.0f : -1.0f; }

// Times the Hadamard matrix of the largest power of 2 that divides `size`, block by block, in place.
MIXKV_INLINE void hadamard(float* x, int size) {
  const int block = size & -size;
  for (int span = 1; span < block; span *= 2)
    for (int first = 0; first < size; first += 2 * span)
      for (int i = first; i < first + span; ++i) {
        const float a = x[i], b = x[i + span];
        x[i] = a + b;
        x[i + span] = a - b;
      }
  const float factor = 1.0f / sqrtf(float(block));
  for (int i = 0; i < size; ++i) x[i] *= factor;
}

template <class T>
static void rotate(const void* from, int size, float* to) {
  const T* row = (const T*)from;
  for (int d = 0; d < size; d += kLanes) store(to + d, load(row + d));
  for (int d = 0; d < size; ++d) to[d] *= sign_of(d);
  hadamard(to, size);
}

template <class T>
static void rotate_back(const float* from, int size, void* to) {
  float row[256];
  memcpy(row, from, size * sizeof(float));
  hadamard(row, size);
  T* out = (T*)to;
  for (int d = 0; d < size; ++d) put(out + d, row[d] * sign_of(d));
}

// Elements in steps of the scale, and the level nearest to each; `code`: its number.
MIXKV_INLINE Vec nearest(Vec x, IntVec& code) {
  Vec level = all(kLevels[0]);
  code = IntVec{};
  for (int k = 0; k < 15; ++k) {
    const IntVec above = x > 0.5f * (kLevels[k] + kLevels[k + 1]);
    level += (Vec)((IntVec)all(kLevels[k + 1] - kLevels[k]) & above);
    code -= above;
  }
  return level;
}

static void pack(const float* row, int size, uint8_t* codes, uint16_t* scale) {
  Vec squares = {};
  for (int d = 0; d < size; d += kLanes) squares += load(row + d) * load(row + d);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += squares[i];
  float step = sqrtf(total / size) * (kLargestLevel / 127.0f);
  IntVec code;
  for (int fit = 0; fit < 3; ++fit) {
    Vec products = {}, levels = {};
    const Vec inverse = all(1.0f / (step > 1e-30f ? step : 1e-30f));
    for (int d = 0; d < size; d += kLanes) {
      const Vec x = load(row + d), level = nearest(x * inverse, code);
      products += x * level;
      levels += level * level;
    }
    float above = 0.0f, below = 0.0f;
    for (int i = 0; i < kLanes; ++i) {
      above += products[i];
      below += levels[i];
    }
    step = above / below;
  }
  Half half;
  put(&half, step < 65504.0f ? step : 65504.0f);
  *scale = half.bits;
  const float held = get(&half);
  const Vec inverse = all(held > 0.0f ? 1.0f / held : 0.0f);
  uint8_t each[256];
  for (int d = 0; d < size; d += kLanes) {
    nearest(load(row + d) * inverse, code);
    for (int i = 0; i < kLanes; ++i) each[d + i] = uint8_t(code[i]);
  }
  for (int d = 0; d < size / 2; ++d) codes[d] = uint8_t(each[d] | each[d + size / 2] << 4);
}

}  // namespace
