// Rotation of rows and their codes of 4 bits: `rotated` and `packed` of mixkv.ops.row_codes.
#pragma once

#include <math.h>

#include "levels.h"
#include "simd.h"

namespace {

struct Signs {
  alignas(64) float of[256];
};

constexpr Signs make_signs() {
  Signs signs{};
  for (uint64_t index = 0; index < 256; ++index) signs.of[index] = index * index * 2654435761u >> 13 & 1 ? 1.0f : -1.0f;
  return signs;
}

constexpr Signs kSigns = make_signs();

// The sums and differences of lanes that are 1, 2, .. kLanes / 2 apart.
MIXKV_INLINE Vec within(Vec x) {
#if defined(__AVX512F__)
  x = MIXKV_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) +
      x * Vec{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  x = MIXKV_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) +
      x * Vec{1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  x = MIXKV_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) +
      x * Vec{1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  return MIXKV_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
         x * Vec{1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
#elif defined(__AVX2__)
  x = MIXKV_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6) + x * Vec{1, -1, 1, -1, 1, -1, 1, -1};
  x = MIXKV_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5) + x * Vec{1, 1, -1, -1, 1, 1, -1, -1};
  return MIXKV_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3) + x * Vec{1, 1, 1, 1, -1, -1, -1, -1};
#else
  x = MIXKV_SHUFFLE(x, x, 1, 0, 3, 2) + x * Vec{1, -1, 1, -1};
  return MIXKV_SHUFFLE(x, x, 2, 3, 0, 1) + x * Vec{1, 1, -1, -1};
#endif
}

// The same of elements further apart, in place, in blocks of the largest power of 2 that divides `size`. With `within` and the factor
// that is a product with a Hadamard matrix.
MIXKV_INLINE void across(float* x, int size) {
  const int block = size & -size;
  for (int span = kLanes; span < block; span *= 2)
    for (int first = 0; first < size; first += 2 * span)
      for (int i = first; i < first + span; i += kLanes) {
        const Vec a = load(x + i), b = load(x + i + span);
        store(x + i, a + b);
        store(x + i + span, a - b);
      }
}

MIXKV_INLINE Vec factor_of(int size) { return all(1.0f / sqrtf(float(size & -size))); }

template <class T>
static void rotate(const void* from, int size, float* to) {
  const T* row = (const T*)from;
  for (int d = 0; d < size; d += kLanes) store(to + d, within(load(row + d) * load(kSigns.of + d)));
  across(to, size);
  const Vec factor = factor_of(size);
  for (int d = 0; d < size; d += kLanes) store(to + d, load(to + d) * factor);
}

template <class T>
static void rotate_back(const float* from, int size, void* to) {
  float row[256];
  for (int d = 0; d < size; d += kLanes) store(row + d, within(load(from + d)));
  across(row, size);
  const Vec factor = factor_of(size);
  T* out = (T*)to;
  for (int d = 0; d < size; d += kLanes) store(row + d, load(row + d) * factor * load(kSigns.of + d));
  for (int d = 0; d < size; ++d) put(out + d, row[d]);
}

// The sum of a vector's lanes.
MIXKV_INLINE float total(Vec x) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[kLanes / 4];
  memcpy(parts, &x, sizeof x);
  for (int span = kLanes / 8; span > 0; span /= 2)
    for (int i = 0; i < span; ++i) parts[i] += parts[i + span];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// Levels by their size, and the bounds between them. The i-th bound lies between 16 i and 16 (i + 1), so that a number needs to be
// compared with one of them only. As an integer, the last one is the largest there is.
constexpr int kSizes = 8;
struct Sizes {
  float level[kSizes], bound[kSizes];
};

constexpr Sizes make_sizes() {
  Sizes sizes{};
  for (int i = 0; i < kSizes; ++i) {
    sizes.level[i] = kLevels[kSizes + i];
    sizes.bound[i] = i + 1 < kSizes ? 0.5f * (kLevels[kSizes + i] + kLevels[kSizes + i + 1]) : __builtin_nanf("0x3fffff");
  }
  return sizes;
}

constexpr bool apart(const Sizes& sizes) {
  for (int i = 0; i + 1 < kSizes; ++i)
    if (!(sizes.bound[i] > 16 * i && sizes.bound[i] < 16 * (i + 1))) return false;
  return true;
}

alignas(64) constexpr Sizes kBySize = make_sizes();
static_assert(apart(kBySize), "a bound lies elsewhere");

MIXKV_INLINE Vec look_up(const float* table, IntVec index) {
#if defined(__AVX512F__)
  const __m512 both = _mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(table));
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, both);
#elif defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  Vec found;
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i]];
  return found;
#endif
}

// The number, by their size, of the levels nearest to elements in steps of the scale. Half way between two it is that of the lower.
MIXKV_INLINE IntVec nearest(Vec x) {
  // Numbers below 0 take the larger of two sizes: their bits are compared one higher.
  const BitVec size = (BitVec)x & 0x7fffffffu;
  const IntVec raised = (IntVec)(size - ~(BitVec)(x > 0.0f));
#if defined(__AVX2__)
  const Vec magnitude = (Vec)size, most = all(127.0f);
  const IntVec below = __builtin_convertvector((magnitude < most ? magnitude : most) * 0.0625f, IntVec);
  return below - (IntVec)(raised > (IntVec)look_up(kBySize.bound, below));
#else
  IntVec number = {};
  for (int i = 0; i + 1 < kSizes; ++i) number -= (IntVec)(raised > (IntVec)all(kBySize.bound[i]));
  return number;
#endif
}

static void pack(const float* row, int size, uint8_t* codes, uint16_t* scale) {
  Vec squares = {};
  for (int d = 0; d < size; d += kLanes) squares += load(row + d) * load(row + d);
  float step = sqrtf(total(squares) / size) * (kLargestLevel / 127.0f);
  for (int fit = 0; fit < 3; ++fit) {
    Vec products = {}, levels = {};
    const Vec inverse = all(1.0f / (step > 1e-30f ? step : 1e-30f));
    for (int d = 0; d < size; d += kLanes) {
      const Vec x = load(row + d), level = look_up(kBySize.level, nearest(x * inverse));
      products += (Vec)((BitVec)x & 0x7fffffffu) * level;
      levels += level * level;
    }
    step = total(products) / total(levels);
  }
  Half half;
  put(&half, step > 65504.0f ? 65504.0f : step);
  *scale = half.bits;
  const float held = get(&half);
  const Vec inverse = all(held > 0.0f ? 1.0f / held : 0.0f);
  uint8_t each[256];
  for (int d = 0; d < size; d += kLanes) {
    const Vec x = load(row + d) * inverse;
    const IntVec number = nearest(x);
    const ByteVec code = __builtin_convertvector((IntVec)(x > 0.0f ? kSizes + number : kSizes - 1 - number), ByteVec);
    memcpy(each + d, &code, sizeof code);
  }
  for (int d = 0; d < size / 2; ++d) codes[d] = uint8_t(each[d] | each[d + size / 2] << 4);
}

}  // namespace
