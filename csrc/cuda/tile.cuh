// A warp's unit of work: 16 queries by 16 rows, all in shared memory.
//
// Logits lie in the layout of the matrix units' results: of logits[8], number i belongs to query `query_of(i)` and row
// `row_of(i)`. Outputs [16 queries, value_size] lie alike: of out[n][4], number i belongs to query `query_of(i)` and element
// 8 n + 2 (lane % 4) + i % 2. Half precision runs on the matrix units, float on the ordinary ones, for its full precision.
#pragma once

#include "instructions.cuh"

namespace mixkv::cuda {

constexpr int kTileQueries = 16;
constexpr int kTileRows = 16;

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int query_of(int i) { return lane_index() / 4 + ((i & 2) ? 8 : 0); }
__device__ inline int row_of(int i) { return (i / 4) * 8 + (lane_index() % 4) * 2 + (i & 1); }

// Sizes known when the code is compiled, or any multiple of 16 up to them.
template <int Capacity_, bool Exact_>
struct Sizes {
  static constexpr int Capacity = Capacity_;
  static constexpr bool Exact = Exact_;
  __device__ static bool has(int first, int size) { return Exact || first < size; }
};

// Calls run with the Sizes that fit best.
template <class T, class Run>
void with_sizes(int size, int value_size, Run run) {
  if constexpr (sizeof(T) == 2) {
    if (size == 64 && value_size == 64) return run(Sizes<64, true>());
    if (size == 128 && value_size == 128) return run(Sizes<128, true>());
    if (size == 256 && value_size == 256) return run(Sizes<256, true>());
  }
  if (size <= 128 && value_size <= 128) return run(Sizes<128, false>());
  run(Sizes<256, false>());
}

// Elements in a 16-byte access; also what separates the ends of rows in shared memory, so that eight rows of equal columns lie in
// different banks.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// The 16 rows of keys that a warp multiplies by many queries.
template <class T, class S>
struct HeldKeys {
  uint32_t parts[S::Capacity / 16][4];

  __device__ void load(const T* keys, int stride, int size) {
    const T* from = keys + (lane_index() % 8 + lane_index() / 16 * 8) * stride + lane_index() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < S::Capacity / 16; ++k)
      if (S::has(k * 16, size)) load_matrices(parts[k], from + k * 16);
  }

  __device__ void multiply(float (&logits)[8], const T* queries, int stride, int size) const {
    const T* from = queries + lane_index() % 16 * stride + lane_index() / 16 * 8;
#pragma unroll
    for (int k = 0; k < S::Capacity / 16; ++k) {
      if (S::has(k * 16, size)) {
        uint32_t a[4];
        load_matrices(a, from + k * 16);
        multiply_add<T>(logits, a, parts[k][0], parts[k][1]);
        multiply_add<T>(logits + 4, a, parts[k][2], parts[k][3]);
      }
    }
  }
};

template <class S>
struct HeldKeys<float, S> {
  const float* keys;
  int key_stride;

  __device__ void load(const float* from, int stride, int) {
    keys = from;
    key_stride = stride;
  }

  __device__ void multiply(float (&logits)[8], const float* queries, int stride, int size) const {
    const float* query[2] = {queries + query_of(0) * stride, queries + query_of(2) * stride};
    const float* row[4] = {keys + row_of(0) * key_stride, keys + row_of(1) * key_stride, keys + row_of(4) * key_stride,
                           keys + row_of(5) * key_stride};
#pragma unroll 2
    for (int d = 0; d < size; d += 4) {
      float4 q[2], k[4];
      for (int i = 0; i < 2; ++i) q[i] = *reinterpret_cast<const float4*>(query[i] + d);
      for (int i = 0; i < 4; ++i) k[i] = *reinterpret_cast<const float4*>(row[i] + d);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 a = q[i / 2 % 2], b = k[i / 4 * 2 + i % 2];
        logits[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
  }
};

// Logits += queries . keys, for keys that are used once.
template <class T, class S>
__device__ inline void multiply_keys(float (&logits)[8], const T* queries, const T* keys, int stride, int size) {
  if constexpr (sizeof(T) == 4) {
    HeldKeys<T, S> held;
    held.load(keys, stride, size);
    held.multiply(logits, queries, stride, size);
  } else {
    const T* query = queries + lane_index() % 16 * stride + lane_index() / 16 * 8;
    const T* key = keys + (lane_index() % 8 + lane_index() / 16 * 8) * stride + lane_index() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < S::Capacity / 16; ++k) {
      if (S::has(k * 16, size)) {
        uint32_t a[4], b[4];
        load_matrices(a, query + k * 16);
        load_matrices(b, key + k * 16);
        multiply_add<T>(logits, a, b[0], b[1]);
        multiply_add<T>(logits + 4, a, b[2], b[3]);
      }
    }
  }
}

__device__ inline uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// out += mass . values.
template <class T, class S>
__device__ inline void add_values(float (&out)[S::Capacity / 8][4], const float (&mass)[8], const T* values, int stride, int size) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      // Row r's mass is in the lane of the same queries whose columns it is.
      const int holder = lane_index() / 4 * 4 + r % 8 / 2, i = r / 8 * 4 + r % 2;
      const float low = from_lane(mass[i], holder), high = from_lane(mass[i + 2], holder);
      const T* row = values + r * stride + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < S::Capacity / 8; ++n) {
        if (S::has(n * 8, size)) {
          const float2 v = *reinterpret_cast<const float2*>(row + n * 8);
          out[n][0] += low * v.x;
          out[n][1] += low * v.y;
          out[n][2] += high * v.x;
          out[n][3] += high * v.y;
        }
      }
    }
  } else {
    // Results of one product have the layout of the next one's left side.
    const uint32_t a[4] = {pack(T(), mass[0], mass[1]), pack(T(), mass[2], mass[3]), pack(T(), mass[4], mass[5]),
                           pack(T(), mass[6], mass[7])};
    const T* from = values + lane_index() % 16 * stride + lane_index() / 16 * 8;
#pragma unroll
    for (int n = 0; n < S::Capacity / 16; ++n) {
      if (S::has(n * 16, size)) {
        uint32_t b[4];
        load_matrices_transposed(b, from + n * 16);
        multiply_add<T>(out[2 * n], a, b[0], b[1]);
        multiply_add<T>(out[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Over the lanes that share a query.
__device__ inline float query_maximum(float x) {
  x = fmaxf(x, across(x, 1));
  return fmaxf(x, across(x, 2));
}

__device__ inline float query_sum(float x) {
  x += across(x, 1);
  return x + across(x, 2);
}

// Copies `Rows` rows of `size` elements to shared memory in the background with `Threads` threads. row(i) is where row i begins,
// nullptr for a row of zeros; `any` is a global address.
template <class T, int Rows, int Threads, class Row>
__device__ inline void copy_rows(T* to, int stride, int size, const T* any, Row row) {
  const int chunks = size / kVector<T>;
  const int row_step = Threads / chunks, chunk_step = Threads % chunks;
  int i = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  while (i < Rows) {
    const T* from = row(i);
    copy_async(to + i * stride + chunk * kVector<T>, from ? from + chunk * kVector<T> : any, from != nullptr);
    i += row_step;
    chunk += chunk_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      ++i;
    }
  }
}

}  // namespace mixkv::cuda
