// Attention over runs of codes. Those of 4 bits become levels in int8, a tile of rows at a time, and are attended to as codes of 8 bits.
#pragma once

#include "attend.h"
#include "levels.h"

namespace {

constexpr int kLargestSize = 256;

// The levels of a row of `half` bytes: of their lower four bits, then of the upper.
MIXKV_INLINE void unpack(const uint8_t* codes, int half, int8_t* out) {
  int d = 0;
#if defined(__AVX2__)
  const __m128i levels = _mm_load_si128((const __m128i*)kLevels);
  const __m256i both = _mm256_broadcastsi128_si256(levels), low = _mm256_set1_epi8(15);
  for (; d + 32 <= half; d += 32) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)(codes + d));
    _mm256_storeu_si256((__m256i*)(out + d), _mm256_shuffle_epi8(both, _mm256_and_si256(x, low)));
    _mm256_storeu_si256((__m256i*)(out + half + d), _mm256_shuffle_epi8(both, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
  }
  const __m128i lower = _mm_set1_epi8(15);
  for (; d + 8 <= half; d += 8) {
    const __m128i x = _mm_loadl_epi64((const __m128i*)(codes + d));
    _mm_storel_epi64((__m128i*)(out + d), _mm_shuffle_epi8(levels, _mm_and_si128(x, lower)));
    _mm_storel_epi64((__m128i*)(out + half + d), _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi16(x, 4), lower)));
  }
#endif
  for (; d < half; ++d) {
    out[d] = kLevels[codes[d] & 15];
    out[half + d] = kLevels[codes[d] >> 4];
  }
}

template <class T>
static void attend_codes(const Queries& queries, const Run& run, const Visible* visible, const State& state, float* scratch) {
  if (!run.packed) return attend<T, Int8>(queries, run, visible, state, scratch);
  alignas(64) int8_t keys[kTile * kLargestSize], values[kTile * kLargestSize];
  for (int64_t first = 0; first < run.rows; first += kTile) {
    const int rows = run.rows - first < kTile ? int(run.rows - first) : kTile;
    for (int row = 0; row < rows; ++row) {
      const int64_t at = first + row;
      const uint8_t* key = (const uint8_t*)run.key + at * run.key_stride;
      const uint8_t* value = (const uint8_t*)run.value + at * run.value_stride;
      fetch(key + kAhead / 2);
      fetch(value + kAhead / 2);
      unpack(key, queries.size / 2, keys + row * queries.size);
      unpack(value, queries.value_size / 2, values + row * queries.value_size);
    }
    const Run tile{keys, values, queries.size, queries.value_size, rows, run.key_scale + first, run.value_scale + first};
    attend<T, Int8>(queries, tile, nullptr, state, scratch);
  }
}

}  // namespace
