// Attention of a few query rows over runs of rows: each key and value row is read once for up to kGroup queries.
//
// R rows and Q queries make R * Q dot products at a time, as many as a vector has lanes, so that one vector holds their logits:
// lane q * R + r belongs to query q and row r. The softmax keeps that layout ("block").
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using mixkv::Queries;
using mixkv::Run;
using mixkv::State;
using mixkv::Visible;

constexpr int kGroup = 4;
// Rows whose logits are held at once.
constexpr int kTile = 128;

// Bytes ahead of a load at which memory is asked for: the hardware prefetcher stops at every change between keys and values.
constexpr int kAhead = 4096;

MIXKV_INLINE void fetch(const void* address) { __builtin_prefetch(address, 0, 3); }

template <int Q>
constexpr int kRows = kLanes / Q;

// A query in the form that the dot product wants: float; bfloat16 where the chip multiplies that; for codes in int8 integers of 16 bits,
// whose products the chip sums in 32, with a factor for each query.
template <class T>
struct QueryOf {
  typedef float Type;
};

#if defined(__AVX512BF16__)
template <>
struct QueryOf<Bfloat16> {
  typedef Bfloat16 Type;
};

MIXKV_INLINE __m512bh load_pairs(const Bfloat16* from, int count) {
  __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}
#endif

#if defined(__AVX2__)
template <>
struct QueryOf<Int8> {
  typedef int16_t Type;
};
#endif

MIXKV_INLINE int padded_size(int size) { return (size + 31) / 32 * 32; }

// Queries of elements T for rows of elements Row.
template <class T, class Row>
MIXKV_INLINE void prepare(const Queries& queries, typename QueryOf<Row>::Type* out) {
  int padded = padded_size(queries.size);
  for (int i = 0; i < queries.count; ++i) {
    const T* row = (const T*)queries.rows[i];
    auto* to = out + i * padded;
    if constexpr (__is_same(typename QueryOf<Row>::Type, T)) {
      memcpy((void*)to, row, queries.size * sizeof(T));
    } else {
      for (int d = 0; d < queries.size; d += kLanes) store(to + d, load(row + d));
    }
    memset((void*)(to + queries.size), 0, (padded - queries.size) * sizeof *to);
  }
}

// At most this: 256 products with codes of at most 127 do not exceed 32 bits.
constexpr float kWord = 32767.0f;

// Queries as integers of 16 bits, and by what each is to be multiplied.
template <class T>
MIXKV_INLINE void prepare_words(const Queries& queries, int16_t* out, float* factor) {
  const int padded = padded_size(queries.size);
  for (int i = 0; i < queries.count; ++i) {
    const T* row = (const T*)queries.rows[i];
    Vec largest = {};
    for (int d = 0; d < queries.size; d += kLanes) largest = maximum((Vec)((BitVec)load(row + d) & 0x7fffffffu), largest);
    float most = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
    factor[i] = most / kWord;
    const Vec inverse = all(most > 0.0f ? kWord / most : 0.0f);
    int16_t* to = out + i * padded;
    for (int d = 0; d < queries.size; d += kLanes) {
      const Vec x = rounded(load(row + d) * inverse);
      for (int lane = 0; lane < kLanes; ++lane) to[d + lane] = (int16_t)x[lane];
    }
    memset(to + queries.size, 0, (padded - queries.size) * sizeof *to);
  }
}

#if defined(__AVX2__)
// One block of dot products with codes. Rows beyond `last` are read as row `last`.
template <int Q>
MIXKV_INLINE Vec dots_words(const int16_t* query, int size, const Int8* key, int64_t stride, int last) {
  constexpr int R = kRows<Q>;
  const int padded = padded_size(size);
  const Int8* row[R];
  for (int r = 0; r < R; ++r) row[r] = key + (r < last ? r : last) * stride;
  IntVec total[kLanes] = {};
  for (int d = 0; d < size; d += 2 * kLanes) {
#if defined(__AVX512F__)
    const __mmask32 mask = size - d >= 32 ? ~0u : (1u << (size - d)) - 1;
    __m512i q[Q];
    for (int i = 0; i < Q; ++i) q[i] = _mm512_loadu_si512(query + i * padded + d);
    for (int r = 0; r < R; ++r) {
      const __m512i k = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, row[r] + d));
      if (d % 64 == 0) fetch(row[r] + d + kAhead);
      for (int i = 0; i < Q; ++i) {
#if defined(__AVX512VNNI__)
        total[i * R + r] = (IntVec)_mm512_dpwssd_epi32((__m512i)total[i * R + r], q[i], k);
#else
        total[i * R + r] += (IntVec)_mm512_madd_epi16(q[i], k);
#endif
      }
    }
#else
    __m256i q[Q];
    for (int i = 0; i < Q; ++i) q[i] = _mm256_loadu_si256((const __m256i*)(query + i * padded + d));
    for (int r = 0; r < R; ++r) {
      const __m256i k = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(row[r] + d)));
      if (d % 64 == 0) fetch(row[r] + d + kAhead);
      for (int i = 0; i < Q; ++i) total[i * R + r] += (IntVec)_mm256_madd_epi16(q[i], k);
    }
#endif
  }
  return __builtin_convertvector(sums(total), Vec);
}
#endif

// Memory is asked for a line at a time.
template <class T>
MIXKV_INLINE void fetch_line(const T* address, int element) {
  if (sizeof(T) > 1 || element % 64 == 0) fetch(address + kAhead / sizeof(T));
}

// One block of dot products. Rows beyond `last` are read as row `last`.
template <class T, int Q>
MIXKV_INLINE Vec dots(const typename QueryOf<T>::Type* query, int size, const T* key, int64_t stride, int last) {
#if defined(__AVX2__)
  if constexpr (__is_same(T, Int8)) return dots_words<Q>(query, size, key, stride, last);
#endif
  constexpr int R = kRows<Q>;
  const int padded = padded_size(size);
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = key + (r < last ? r : last) * stride;
  Vec total[kLanes] = {};
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, Bfloat16)) {
    for (int d = 0; d < size; d += 32) {
      __m512bh q[Q];
      for (int i = 0; i < Q; ++i) q[i] = (__m512bh)_mm512_loadu_si512(query + i * padded + d);
      for (int r = 0; r < R; ++r) {
        __m512bh k = load_pairs(row[r] + d, size - d);
        fetch(row[r] + d + kAhead / sizeof(T));
        for (int i = 0; i < Q; ++i) total[i * R + r] = (Vec)_mm512_dpbf16_ps((__m512)total[i * R + r], q[i], k);
      }
    }
    return sums(total);
  } else
#endif
  if constexpr (__is_same(typename QueryOf<T>::Type, float)) {
    for (int d = 0; d < size; d += kLanes) {
      Vec q[Q];
      for (int i = 0; i < Q; ++i) q[i] = load(query + i * padded + d);
      for (int r = 0; r < R; ++r) {
        Vec k = load(row[r] + d);
        fetch_line(row[r] + d, d);
        for (int i = 0; i < Q; ++i) total[i * R + r] += q[i] * k;
      }
    }
    return sums(total);
  }
}

template <int Q>
MIXKV_INLINE int lane(int query, int row) {
  return row / kRows<Q> * kLanes + query * kRows<Q> + row % kRows<Q>;
}

template <class T, int Q, int Vectors>
MIXKV_INLINE void add_values(float* sum, int value_size, const float* scale, const float* mass, const T* value, int64_t stride, int rows) {
  constexpr int R = kRows<Q>;
  Vec total[Q][Vectors];
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < Vectors; ++j) total[i][j] = load(sum + i * value_size + j * kLanes) * scale[i];
  auto add = [&](const float* block, int r, const T* row) __attribute__((always_inline)) {
    Vec v[Vectors];
    for (int j = 0; j < Vectors; ++j) {
      v[j] = load(row + j * kLanes);
      fetch_line(row + j * kLanes, j * kLanes);
    }
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < Vectors; ++j) total[i][j] += block[i * R + r] * v[j];
  };
  int first = 0;
  for (; first + R <= rows; first += R, mass += kLanes)
    for (int r = 0; r < R; ++r, value += stride) add(mass, r, value);
  for (int r = 0; first < rows; ++first, ++r, value += stride) add(mass, r, value);
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < Vectors; ++j) store(sum + i * value_size + j * kLanes, total[i][j]);
}

// The scales of rows in the lanes of the blocks that hold their logits.
template <int Q>
MIXKV_INLINE void spread(const uint16_t* scale, int rows, float* lanes) {
  constexpr int R = kRows<Q>;
  const Half* from = (const Half*)scale;
  float each[kTile + kLanes] = {};
  int row = 0;
  for (; row + kLanes <= rows; row += kLanes) store(each + row, load(from + row));
  for (; row < rows; ++row) each[row] = get(from + row);
  for (int first = 0; first < rows; first += R, lanes += kLanes)
    for (int i = 0; i < Q; ++i)
      for (int r = 0; r < R; ++r) lanes[i * R + r] = each[first + r];
}

// Takes `rows` <= kTile rows into the state of Q queries.
template <class T, int Q>
static void attend_tile(const typename QueryOf<T>::Type* query, const Queries& queries, const float* factor, const Run& run,
                        const Visible* visible, int64_t first, int offset, const State& state, float* logits) {
  constexpr int R = kRows<Q>;
  Vec scaling = all(queries.scaling);
  if (factor != nullptr)
    for (int i = 0; i < Q; ++i)
      for (int r = 0; r < R; ++r) scaling[i * R + r] = factor[offset + i] * queries.scaling;
  const int rows = run.rows - first < kTile ? int(run.rows - first) : kTile;
  const T* key = (const T*)run.key + first * run.key_stride;
  const T* value = (const T*)run.value + first * run.value_stride;
  const int blocks = (rows + R - 1) / R;
  constexpr bool coded = __is_same(T, Int8);
  alignas(64) float row_scale[coded ? (kTile / R + 1) * kLanes : 1];
  if constexpr (coded) spread<Q>(run.key_scale + first, rows, row_scale);
  for (int b = 0; b < blocks; ++b) {
    const T* at = key + int64_t(b) * R * run.key_stride;
    Vec x = (b + 1) * R <= rows ? dots<T, Q>(query, queries.size, at, run.key_stride, R - 1)
                                : dots<T, Q>(query, queries.size, at, run.key_stride, rows - 1 - b * R);
    x = x * scaling;
    if constexpr (coded) x = x * load(row_scale + b * kLanes);
    if (queries.softcap != 0.0f) x = queries.softcap * tangent(x / queries.softcap);
    store(logits + b * kLanes, x);
  }
  for (int row = rows; row < blocks * R; ++row)
    for (int i = 0; i < Q; ++i) logits[lane<Q>(i, row)] = -kInfinity;
  if (visible != nullptr) {
    for (int i = 0; i < Q; ++i) {
      int64_t limit = visible->limits ? visible->limits[offset + i] - first : kTile;
      const uint8_t* mask = visible->masks ? visible->masks[offset + i] + first * visible->mask_stride : nullptr;
      for (int row = 0; row < rows; ++row)
        if (row > limit || (mask && !mask[row * visible->mask_stride])) logits[lane<Q>(i, row)] = -kInfinity;
    }
  }

  Vec highest = all(-kInfinity);
  for (int b = 0; b < blocks; ++b) highest = maximum(highest, load(logits + b * kLanes));
  Vec base = {};
  float scale[Q];
  for (int i = 0; i < Q; ++i) {
    float& largest = state.maximum[offset + i];
    float next = largest;
    for (int r = 0; r < R; ++r) next = highest[i * R + r] > next ? highest[i * R + r] : next;
    // A query that has seen nothing yet has no largest logit: any base does.
    float origin = next == -kInfinity ? 0.0f : next;
    scale[i] = largest == next ? 1.0f : exponential(largest - origin);
    largest = next;
    for (int r = 0; r < R; ++r) base[i * R + r] = origin;
  }
  Vec mass = {};
  if constexpr (coded) spread<Q>(run.value_scale + first, rows, row_scale);
  for (int b = 0; b < blocks; ++b) {
    Vec x = exponential(load(logits + b * kLanes) - base);
    mass += x;
    if constexpr (coded) x = x * load(row_scale + b * kLanes);
    store(logits + b * kLanes, x);
  }
  for (int i = 0; i < Q; ++i) {
    float added = 0.0f;
    for (int r = 0; r < R; ++r) added += mass[i * R + r];
    state.mass[offset + i] = state.mass[offset + i] * scale[i] + added;
  }

  const int size = queries.value_size;
  float* sum = state.sum + int64_t(offset) * size;
  constexpr int kWide = kLanes == 16 ? (Q <= 2 ? 8 : 4) : (Q <= 2 ? 4 : 2);
  int d = 0;
  for (; d + kWide * kLanes <= size; d += kWide * kLanes)
    add_values<T, Q, kWide>(sum + d, size, scale, logits, value + d, run.value_stride, rows);
  for (; d + 2 * kLanes <= size; d += 2 * kLanes)
    add_values<T, Q, 2>(sum + d, size, scale, logits, value + d, run.value_stride, rows);
  for (; d < size; d += kLanes) add_values<T, Q, 1>(sum + d, size, scale, logits, value + d, run.value_stride, rows);
}

// Queries of elements T over rows of elements Row.
template <class T, class Row>
static void attend(const Queries& queries, const Run& run, const Visible* visible, const State& state, float* scratch) {
  typedef typename QueryOf<Row>::Type Query;
  float* logits = scratch;
  Query* query = (Query*)(scratch + kTile * kLanes);
  const int padded = padded_size(queries.size);
  float* factor = nullptr;
  if constexpr (__is_same(Query, int16_t)) {
    // The queries take half of their room.
    factor = (float*)(query + queries.count * padded);
    prepare_words<T>(queries, query, factor);
  } else {
    prepare<T, Row>(queries, query);
  }
  for (int64_t first = 0; first < run.rows; first += kTile) {
    int i = 0;
    for (; i + kGroup <= queries.count; i += kGroup)
      attend_tile<Row, kGroup>(query + i * padded, queries, factor, run, visible, first, i, state, logits);
    if (queries.count - i == 3) attend_tile<Row, 3>(query + i * padded, queries, factor, run, visible, first, i, state, logits);
    if (queries.count - i == 2) attend_tile<Row, 2>(query + i * padded, queries, factor, run, visible, first, i, state, logits);
    if (queries.count - i == 1) attend_tile<Row, 1>(query + i * padded, queries, factor, run, visible, first, i, state, logits);
  }
}

static int64_t attend_scratch(int count, int size) { return kTile * kLanes + int64_t(count) * padded_size(size); }

template <class T>
static void finish(const State& state, int count, int value_size, const float* sinks, void* const* out) {
  for (int i = 0; i < count; ++i) {
    const float* sum = state.sum + int64_t(i) * value_size;
    float mass = state.mass[i], factor = 0.0f;
    if (state.maximum[i] > -kInfinity) {
      if (sinks != nullptr) {
        float highest = state.maximum[i] > sinks[i] ? state.maximum[i] : sinks[i];
        factor = exponential(state.maximum[i] - highest);
        mass = mass * factor + exponential(sinks[i] - highest);
      } else {
        factor = 1.0f;
      }
      factor /= mass;
    }
    T* to = (T*)out[i];
    for (int d = 0; d < value_size; ++d) put(to + d, sum[d] * factor);
  }
}

}  // namespace
