// A row as codes in int8 and one scale: x is about code * scale. Equal to `mixkv.ops.row_codes.quantised` to the bit.
#pragma once

#include <string.h>

#include "kernels.h"
#include "simd.h"

namespace {

template <class T>
static void quantise(const void* from, int size, int8_t* codes, uint16_t* scale) {
  const T* row = (const T*)from;
  // The bits of magnitudes are in the order of the magnitudes, and those of NaN are the largest: it is not lost.
  IntVec largest = {};
  for (int d = 0; d < size; d += kLanes) {
    const IntVec bits = (IntVec)((BitVec)load(row + d) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  int32_t most_bits = 0;
  for (int i = 0; i < kLanes; ++i) most_bits = largest[i] > most_bits ? largest[i] : most_bits;
  float most;
  memcpy(&most, &most_bits, sizeof most);
  const float step = most * (1.0f / 127.0f);
  Half half;
  put(&half, step > 65504.0f ? 65504.0f : step);
  *scale = half.bits;
  const float held = get(&half);
  const Vec inverse = all(held > 0.0f ? 1.0f / held : 0.0f);
  for (int d = 0; d < size; d += kLanes) {
    Vec x = rounded(load(row + d) * inverse);
    x = x < -127.0f ? all(-127.0f) : x;
    x = x > 127.0f ? all(127.0f) : x;
    CodeVec code = __builtin_convertvector(__builtin_convertvector(x, IntVec), CodeVec);
    memcpy(codes + d, &code, sizeof code);
  }
}

}  // namespace
