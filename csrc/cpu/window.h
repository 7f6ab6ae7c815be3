// Observation-window attention of one query head: the lanes of a vector are queries, so that a softmax over the tokens needs no
// sums across lanes, and a key is multiplied by broadcasting its elements.
#pragma once

#include "attend.h"

namespace {

using mixkv::Window;

// Tokens multiplied at once: with two vectors of queries they fill half of the registers.
constexpr int kTokens = kLanes == 16 ? 8 : 4;
constexpr int kMostVectors = 2;
// Tokens whose logits are stored at once.
constexpr int64_t kBlockTokens = 4096;

MIXKV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Keys as they are broadcast: floats, or pairs of bfloat16 where the chip multiplies those.
template <class T>
constexpr int kPerStep = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kPerStep<Bfloat16> = 2;
#endif

// Packs queries first .. first + V * kLanes (zeros beyond the window) as [D / kPerStep][V * kLanes].
template <class T, int V>
static void pack_queries(const Window& window, int64_t first, float* out) {
  constexpr int kStep = kPerStep<T>;
  for (int i = 0; i < V * kLanes; ++i) {
    const T* row = (const T*)window.query + (first + i) * window.query_stride;
    const bool real = first + i < window.window;
    for (int d = 0; d < window.size; d += kStep) {
      float* to = out + d / kStep * V * kLanes + i;
      if constexpr (kStep == 1) {
        *to = real ? get(row + d) : 0.0f;
      } else {
        memset(to, 0, 4);
        if (real) memcpy(to, row + d, 4);
      }
    }
  }
}

// total[r][v] = dot products of row r with kLanes packed queries.
template <class T, int V>
MIXKV_INLINE void multiply(const float* queries, const float* const* rows, int steps, Vec total[kTokens][V]) {
  for (int r = 0; r < kTokens; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = Vec{};
  for (int step = 0; step < steps; ++step) {
    Vec q[V];
    for (int v = 0; v < V; ++v) q[v] = load(queries + (step * V + v) * kLanes);
    for (int r = 0; r < kTokens; ++r) {
#if defined(__AVX512BF16__)
      if constexpr (kPerStep<T> == 2) {
        int32_t pair;
        memcpy(&pair, rows[r] + step, 4);
        for (int v = 0; v < V; ++v)
          total[r][v] = (Vec)_mm512_dpbf16_ps((__m512)total[r][v], (__m512bh)q[v], (__m512bh)_mm512_set1_epi32(pair));
        continue;
      }
#endif
      for (int v = 0; v < V; ++v) total[r][v] += q[v] * rows[r][step];
    }
  }
}

// Writes the logits of tokens begin .. end to logits [end - begin][V * kLanes] and raises highest.
template <class T, int V>
static void window_logits(const Window& window, int64_t first, int64_t begin, int64_t end, const float* queries, float* converted,
                          float* logits, Vec highest[V]) {
  constexpr int kWidth = V * kLanes;
  const int64_t candidates = window.tokens - window.window;
  for (int64_t n = begin; n < end; n += kTokens) {
    const float* rows[kTokens];
    for (int r = 0; r < kTokens; ++r) {
      const int64_t token = n + r < end ? n + r : end - 1;
      const T* key = (const T*)window.key + token * window.key_stride;
      if constexpr (__is_same(T, float) || kPerStep<T> == 2) {
        rows[r] = (const float*)key;
      } else {
        for (int d = 0; d < window.size; d += kLanes) store(converted + r * window.size + d, load(key + d));
        rows[r] = converted + r * window.size;
      }
    }
    Vec total[kTokens][V];
    multiply<T, V>(queries, rows, window.size / kPerStep<T>, total);
    for (int r = 0; r < kTokens && n + r < end; ++r) {
      const bool valid = window.valid == nullptr || window.valid[(n + r) * window.valid_stride];
      // Within the window, query w sees token candidates + i for i <= w.
      const int64_t hidden = n + r - candidates - first;
      for (int v = 0; v < V; ++v) {
        Vec x = total[r][v] * window.scaling;
        if (window.softcap != 0.0f) x = window.softcap * tangent(x / window.softcap);
        if (!valid) x = all(-kInfinity);
        if (hidden > 0)
          for (int i = 0; i < kLanes; ++i)
            if (v * kLanes + i < hidden) x[i] = -kInfinity;
        highest[v] = maximum(highest[v], x);
        store(logits + (n + r - begin) * kWidth + v * kLanes, x);
      }
    }
  }
}

// Adds the weights of queries first .. first + V * kLanes, or their squares, to out [N - W]. What does not fit into one block of
// tokens is multiplied twice: for the sums of the softmax, and for the weights.
template <class T, int V>
static void window_block(const Window& window, int64_t first, float* out, float* scratch) {
  constexpr int kWidth = V * kLanes;
  const int64_t tokens = window.tokens, candidates = tokens - window.window;
  const bool whole = tokens <= kBlockTokens;
  float* queries = scratch;
  float* converted = queries + window.size * kWidth;
  float* logits = converted + window.size * kTokens;
  pack_queries<T, V>(window, first, queries);

  // The largest logit so far, 0 where there is none, and the sum of exponentials relative to it.
  Vec highest[V], base[V] = {}, mass[V] = {}, share[V];
  for (int v = 0; v < V; ++v) highest[v] = all(window.has_sink ? window.sink : -kInfinity);
  for (int64_t begin = 0; begin < tokens; begin += kBlockTokens) {
    const int64_t end = whole ? tokens : least(begin + kBlockTokens, tokens);
    window_logits<T, V>(window, first, begin, end, queries, converted, logits, highest);
    for (int v = 0; v < V; ++v) {
      const Vec before = base[v];
      base[v] = highest[v] > -kInfinity ? highest[v] : Vec{};
      if (begin == 0)
        mass[v] = window.has_sink ? exponential(all(window.sink) - base[v]) : Vec{};
      else
        mass[v] *= exponential(-maximum(base[v] - before, Vec{}));
    }
    for (int64_t n = 0; n < end - begin; ++n) {
      for (int v = 0; v < V; ++v) {
        float* at = logits + n * kWidth + v * kLanes;
        Vec x = exponential(load(at) - base[v]);
        mass[v] += x;
        store(at, x);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int i = 0; i < kLanes; ++i) {
      const bool counts = first + v * kLanes + i < window.window && mass[v][i] > 0.0f;
      share[v][i] = counts ? 1.0f / mass[v][i] : 0.0f;
    }
  }
  for (int64_t begin = 0; begin < candidates; begin += kBlockTokens) {
    const int64_t end = least(begin + kBlockTokens, candidates);
    if (!whole) {
      Vec ignored[V];
      for (int v = 0; v < V; ++v) ignored[v] = base[v];
      window_logits<T, V>(window, first, begin, end, queries, converted, logits, ignored);
      for (int64_t n = 0; n < end - begin; ++n)
        for (int v = 0; v < V; ++v) {
          float* at = logits + n * kWidth + v * kLanes;
          store(at, exponential(load(at) - base[v]));
        }
    }
    for (int64_t n = begin; n < end; n += kLanes) {
      Vec total[kLanes] = {};
      const int64_t count = least(end - n, int64_t(kLanes));
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < V; ++v) {
          const Vec x = load(logits + (n - begin + i) * kWidth + v * kLanes) * share[v];
          total[i] += window.squared ? x * x : x;
        }
      }
      Vec x = sums(total);
      for (int64_t i = 0; i < count; ++i) out[n + i] += x[i];
    }
  }
}

template <class T>
static void window_attention(const Window& window, float* out, float* scratch) {
  const int64_t candidates = window.tokens - window.window;
  memset(out, 0, candidates * sizeof(float));
  int64_t first = 0;
  while (first < window.window) {
    if (window.window - first > kLanes) {
      window_block<T, 2>(window, first, out, scratch);
      first += 2 * kLanes;
    } else {
      window_block<T, 1>(window, first, out, scratch);
      first += kLanes;
    }
  }
  for (int64_t n = 0; n < candidates; ++n) {
    const float mean = out[n] / float(window.window);
    out[n] = window.squared ? __builtin_sqrtf(mean) : mean;
  }
}

static int64_t window_scratch(int64_t tokens, int size) {
  return int64_t(size) * (kMostVectors * kLanes + kTokens) + least(tokens, kBlockTokens) * kMostVectors * kLanes;
}

}  // namespace
