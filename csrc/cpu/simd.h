// Vectors of floats as wide as the instruction set, and the few operations that the kernels need.
//
// Only C headers here: an inline function of the C++ library, compiled for avx512, could be the copy that the linker keeps for
// the whole library.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef int8_t CodeVec __attribute__((vector_size(kLanes)));

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
struct Int8 {
  int8_t code;
};

#define MIXKV_INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define MIXKV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXKV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

constexpr float kInfinity = __builtin_inff();

MIXKV_INLINE Vec all(float x) { return x - Vec{}; }

MIXKV_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

MIXKV_INLINE Vec load(const float* from) {
  Vec x;
  memcpy(&x, from, sizeof x);
  return x;
}

MIXKV_INLINE void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

MIXKV_INLINE BitVec load_shorts(const void* from) {
  ShortVec x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, BitVec);
}

MIXKV_INLINE Vec load(const Bfloat16* from) { return (Vec)(load_shorts(from) << 16); }

MIXKV_INLINE Vec load(const Half* from) {
#if defined(__AVX512F__)
  // The unmasked form warns of an uninitialised value in some versions of gcc.
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  BitVec bits = load_shorts(from);
  BitVec sign = (bits & 0x8000u) << 16;
  BitVec rest = (bits & 0x7fffu) << 13;
  // Shifted into place the exponent is 112 too small; multiplying makes subnormal numbers right, too.
  Vec magnitude = (Vec)rest * 0x1p112f;
  BitVec special = (BitVec)(magnitude >= 65536.0f) & 0x7f800000u;
  return (Vec)((BitVec)magnitude | special | sign);
#endif
}

MIXKV_INLINE Vec load(const Int8* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  CodeVec x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, IntVec), Vec);
#endif
}

// To the nearest integer, of two the even one.
MIXKV_INLINE Vec rounded(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_rintf(x[i]);
  return x;
#endif
}

MIXKV_INLINE void put(float* to, float x) { *to = x; }

MIXKV_INLINE void put(Bfloat16* to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  to->bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : rounded;
}

MIXKV_INLINE void put(Half* to, float x) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t result;
  if (bits > 0x7f800000u) {
    result = 0x7e00;
  } else if (bits >= 0x477ff000u) {
    result = 0x7c00;  // rounds beyond 65504
  } else if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 lines the mantissa up with the bits that remain, rounded.
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&result, &magnitude, 4);
    result -= 0x3f000000u;
  } else {
    result = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
  }
  to->bits = sign | result;
#endif
}

MIXKV_INLINE float get(const float* from) { return *from; }

MIXKV_INLINE float get(const Bfloat16* from) {
  uint32_t bits = (uint32_t)from->bits << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

MIXKV_INLINE float get(const Half* from) {
  uint16_t block[kLanes] = {from->bits};
  return load((const Half*)block)[0];
}

// Sums each of kLanes vectors, of floats or of integers: lane i of the result is the sum of x[i]'s lanes.
template <class V>
MIXKV_INLINE V sums(V* x) {
#if defined(__AVX512F__)
  for (int i = 0; i < 8; ++i) {
    V a = x[2 * i], b = x[2 * i + 1];
    x[i] = MIXKV_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           MIXKV_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    V a = x[2 * i], b = x[2 * i + 1];
    x[i] = MIXKV_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           MIXKV_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    V a = x[2 * i], b = x[2 * i + 1];
    x[i] = MIXKV_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           MIXKV_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return MIXKV_SHUFFLE(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         MIXKV_SHUFFLE(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    V a = x[2 * i], b = x[2 * i + 1];
    x[i] = MIXKV_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + MIXKV_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    V a = x[2 * i], b = x[2 * i + 1];
    x[i] = MIXKV_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + MIXKV_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return MIXKV_SHUFFLE(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIXKV_SHUFFLE(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  V a = MIXKV_SHUFFLE(x[0], x[1], 0, 4, 2, 6) + MIXKV_SHUFFLE(x[0], x[1], 1, 5, 3, 7);
  V b = MIXKV_SHUFFLE(x[2], x[3], 0, 4, 2, 6) + MIXKV_SHUFFLE(x[2], x[3], 1, 5, 3, 7);
  return MIXKV_SHUFFLE(a, b, 0, 1, 4, 5) + MIXKV_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

// exp of x <= 88; exactly 0 below -87 (so for -inf). Cody-Waite reduction and Cephes' polynomial: 2 units in the last place.
MIXKV_INLINE Vec exponential(Vec x) {
  const Vec shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec clamped = maximum(x, all(-87.0f));
  Vec shifted = clamped * 1.44269504f + shift;
  Vec n = shifted - shift;
  Vec f = clamped - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  Vec y = all(1.9875691500e-4f);
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * (f * f) + f + 1.0f;
  IntVec exponent = ((IntVec)shifted - (IntVec)shift + 127) << 23;
  Vec result = y * (Vec)exponent;
  return x < -87.0f ? Vec{} : result;
}

MIXKV_INLINE float exponential(float x) { return exponential(all(x))[0]; }

// Hyperbolic tangent.
MIXKV_INLINE Vec tangent(Vec x) {
  Vec magnitude = (Vec)((BitVec)x & 0x7fffffffu);
  Vec capped = magnitude < 10.0f ? magnitude : all(10.0f);
  // 1 - 2 / (e^2x + 1) cancels near 0: the series there.
  Vec large = 1.0f - 2.0f / (exponential(capped + capped) + 1.0f);
  Vec s = x * x;
  Vec y = all(21844.0f / 6081075.0f);
  y = y * s - 1382.0f / 155925.0f;
  y = y * s + 62.0f / 2835.0f;
  y = y * s - 17.0f / 315.0f;
  y = y * s + 2.0f / 15.0f;
  y = y * s - 1.0f / 3.0f;
  Vec small = magnitude + magnitude * (y * s);
  Vec result = magnitude < 0.35f ? small : large;
  return (Vec)((BitVec)result | ((BitVec)x & 0x80000000u));
}

}  // namespace
