// Attention of query rows over ragged sequences (flash-decoding).
//
// The G query heads of a KV head and the positions of a block of queries are folded into rows: row r of a sequence is head r % G at
// position r / G. A block of threads takes 16 query rows over one part of one sequence: keys and values pass through a ring of
// stages in shared memory, each read from global memory once; each warp keeps a softmax of its own over 16 rows of every stage, and
// the warps' results are merged at the end. Parts of one sequence are merged by a second kernel.
//
// A sequence is its stored rows followed by new ones, which lie elsewhere; where asked to, a block also stores the new rows that it
// meets. No block reads those from the store in the same launch, and lengths change only after the last reader.
//
// In place of new rows a sequence may be followed by chunks of rows that it has chosen. Each takes up the room of a whole chunk; what
// it has not is neither read nor seen.
#pragma once

#include <algorithm>

#include "attention.h"
#include "launch.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace mixkv::cuda {

template <int Capacity>
constexpr int kAttendWarps = Capacity > 128 ? 2 : 4;

constexpr int kMergeThreads = 128;


// Where the output of a sequence's query row begins.
__device__ inline int64_t output_row(const Attention& a, int sequence, int row) {
  const int batch = sequence / a.heads, head = sequence % a.heads;
  return ((int64_t(batch) * a.queries + row / a.groups) * a.heads * a.groups + head * a.groups + row % a.groups) * a.value_size;
}

__device__ inline const float* sink_of(const Attention& a, int sequence, int row) {
  return a.sinks ? a.sinks + sequence % a.heads * a.groups + row % a.groups : nullptr;
}

// Copies new rows first .. end of a sequence (counted from its beginning) into the store.
template <class T>
__device__ inline void store_rows(const Attention& a, int sequence, int64_t start, int stored, int first, int end, const T* key, const T* value) {
  const int key_chunks = a.size / kVector<T>, chunks = key_chunks + a.value_size / kVector<T>;
  for (int item = threadIdx.x; item < (end - first) * chunks; item += blockDim.x) {
    const int row = first + item / chunks, chunk = item % chunks;
    // A caller that breaks its promise of room must not reach other memory.
    if (start + row >= room_end(a, sequence)) continue;
    const bool is_key = chunk < key_chunks;
    const T* from = is_key ? key + int64_t(row - stored) * a.new_key_strides.row : value + int64_t(row - stored) * a.new_value_strides.row;
    T* to = is_key ? static_cast<T*>(a.key) + (start + row) * a.size : static_cast<T*>(a.value) + (start + row) * a.value_size;
    const int at = (is_key ? chunk : chunk - key_chunks) * kVector<T>;
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
    if (chunk == 0) a.position[start + row] = a.evicted ? a.evicted[sequence] + row : a.first_position + row - stored;
  }
}

// The row of the chunks' buffers that is row `place` behind a sequence's stored ones; -1 for none.
__device__ inline int64_t chunk_row(const Attention& a, int sequence, int place) {
  const int64_t item = int64_t(sequence) * a.slots + place / a.chunk_size;
  const int within = place % a.chunk_size;
  if (within >= a.block_rows[item]) return -1;
  const int64_t row = int64_t(a.blocks[item]) + within;
  // A caller's wrong number must not reach other memory.
  return row < a.chunk_capacity ? row : -1;
}

template <class T, class S, bool Chunks>
__global__ void __launch_bounds__(kAttendWarps<S::Capacity> * 32) attend_part(const Attention a) {
  constexpr int kWarps = kAttendWarps<S::Capacity>, kThreads = kWarps * 32, kRows = kWarps * kTileRows;
  const int size = S::Exact ? S::Capacity : a.size, value_size = S::Exact ? S::Capacity : a.value_size;
  const int key_stride = size + kVector<T>, value_stride = value_size + kVector<T>;

  extern __shared__ __align__(16) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  float* maxima = reinterpret_cast<float*>(queries + kTileQueries * key_stride);
  float* masses = maxima + kWarps * kTileQueries;
  float* factors = masses + kWarps * kTileQueries;
  T* ring = reinterpret_cast<T*>(factors + kTileQueries);
  const int stage_elements = kRows * (key_stride + value_stride);

  const int split = blockIdx.x % a.splits, tile = blockIdx.x / a.splits % a.tiles, sequence = blockIdx.x / a.splits / a.tiles;
  const int batch = sequence / a.heads, head = sequence % a.heads;
  const int all_rows = a.groups * a.queries, first_row = tile * kTileQueries;
  const int query_rows = min(kTileQueries, all_rows - first_row);
  const int stored = a.lengths[sequence];
  const int64_t start = a.starts[sequence];
  // Causally, no query of the tile sees new rows after its last position.
  const int reach = Chunks ? a.slots * a.chunk_size
                    : a.causal ? min(a.new_rows, (first_row + query_rows - 1) / a.groups + 1) : a.new_rows;
  // The last part has no bound: a length beyond the host's costs time, not rows.
  const int begin = split * a.chunk, end = split + 1 < a.splits ? min(stored + reach, begin + a.chunk) : stored + reach;
  const int64_t state = (int64_t(sequence) * all_rows + first_row) * a.splits + split;

  if (begin >= end) {
    if (a.splits > 1) {
      if (threadIdx.x < query_rows) a.partial_state[state + threadIdx.x * a.splits] = make_float2(negative_infinity(), 0.0f);
    } else {
      T* out = static_cast<T*>(a.out);
      for (int e = threadIdx.x; e < query_rows * value_size; e += kThreads)
        put(out + output_row(a, sequence, first_row + e / value_size) + e % value_size, 0.0f);
    }
    return;
  }

  const T* query = static_cast<const T*>(a.query) + batch * a.query_strides.batch + head * a.groups * a.query_strides.head;
  const T* key = static_cast<const T*>(a.key) + start * size;
  const T* value = static_cast<const T*>(a.value) + start * value_size;
  const T* new_key = static_cast<const T*>(a.new_key) + batch * a.new_key_strides.batch + head * a.new_key_strides.head;
  const T* new_value = static_cast<const T*>(a.new_value) + batch * a.new_value_strides.batch + head * a.new_value_strides.head;

  const int stages = (end - begin + kRows - 1) / kRows, ahead = a.ring_stages - 1;
  auto load_stage = [&](int stage) {
    if (stage < stages) {
      T* to = ring + stage % a.ring_stages * stage_elements;
      const int first = begin + stage * kRows;
      copy_rows<T, kRows, kThreads>(to, key_stride, size, key, [&](int i) -> const T* {
        const int row = first + i;
        if (row >= end) return nullptr;
        if (row < stored) return key + int64_t(row) * size;
        if constexpr (Chunks) {
          const int64_t at = chunk_row(a, sequence, row - stored);
          return at < 0 ? nullptr : static_cast<const T*>(a.chunk_key) + at * size;
        }
        return new_key + int64_t(row - stored) * a.new_key_strides.row;
      });
      copy_rows<T, kRows, kThreads>(to + kRows * key_stride, value_stride, value_size, value, [&](int i) -> const T* {
        const int row = first + i;
        if (row >= end) return nullptr;
        if (row < stored) return value + int64_t(row) * value_size;
        if constexpr (Chunks) {
          const int64_t at = chunk_row(a, sequence, row - stored);
          return at < 0 ? nullptr : static_cast<const T*>(a.chunk_value) + at * value_size;
        }
        return new_value + int64_t(row - stored) * a.new_value_strides.row;
      });
    }
    // Groups are counted: one a stage, be it empty.
    commit_copies();
  };

  copy_rows<T, kTileQueries, kThreads>(queries, key_stride, size, query, [&](int i) -> const T* {
    const int row = first_row + i;
    if (i >= query_rows) return nullptr;
    return query + row % a.groups * a.query_strides.head + row / a.groups * a.query_strides.row;
  });
  for (int stage = 0; stage < ahead; ++stage) load_stage(stage);
  if (a.store && tile == 0) store_rows(a, sequence, start, stored, max(begin, stored), end, new_key, new_value);

  const int warp = threadIdx.x / 32;
  const Scale scale{a.scaling, a.softcap};
  float out[S::Capacity / 8][4] = {};
  float highest[2] = {negative_infinity(), negative_infinity()}, mass[2] = {0.0f, 0.0f};
  const uint8_t* mask[2] = {};
  int position[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    position[q] = min((first_row + query_of(2 * q)) / a.groups, a.queries - 1);
    if (a.mask) mask[q] = a.mask + batch * a.mask_strides.batch + position[q] * a.mask_strides.head;
  }

  for (int stage = 0; stage < stages; ++stage) {
    if (ahead == 0) {
      __syncthreads();
      load_stage(stage);
      wait_copies<0>();
    } else if (ahead == 1) {
      wait_copies<0>();
    } else if (ahead == 2) {
      wait_copies<1>();
    } else {
      wait_copies<2>();
    }
    // The stage is there for all, and all are done with the one before, whose place the next load takes.
    __syncthreads();
    if (ahead > 0) load_stage(stage + ahead);

    const int first = begin + stage * kRows + warp * kTileRows;
    if (first >= end) continue;
    const T* keys = ring + stage % a.ring_stages * stage_elements + warp * kTileRows * key_stride;
    const T* values = ring + stage % a.ring_stages * stage_elements + kRows * key_stride + warp * kTileRows * value_stride;

    float logits[8] = {};
    multiply_keys<T, S>(logits, queries, keys, key_stride, size);
    const bool hides = (a.causal || a.mask) && first + kTileRows > stored;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = first + row_of(i), fresh = row - stored;
      bool seen = row < end;
      if constexpr (Chunks) seen = seen && (fresh < 0 || chunk_row(a, sequence, fresh) >= 0);
      if (hides && seen && fresh >= 0)
        seen = a.mask ? mask[i / 2 % 2][fresh * a.mask_strides.row] != 0 : fresh <= position[i / 2 % 2];
      logits[i] = seen ? scale(logits[i]) : negative_infinity();
    }

    float factor[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float most = fmaxf(fmaxf(logits[2 * q], logits[2 * q + 1]), fmaxf(logits[2 * q + 4], logits[2 * q + 5]));
      const float next = fmaxf(highest[q], query_maximum(most));
      factor[q] = next == highest[q] ? 1.0f : share(highest[q], next);
      highest[q] = next;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = logits[2 * q + j / 2 * 4 + j % 2];
        x = share(x, next);
        added += x;
      }
      mass[q] = mass[q] * factor[q] + added;
    }
    // Maxima rarely change after a few stages.
    if (any_lane(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < S::Capacity / 8; ++n) {
        out[n][0] *= factor[0];
        out[n][1] *= factor[0];
        out[n][2] *= factor[1];
        out[n][3] *= factor[1];
      }
    }
    add_values<T, S>(out, logits, values, value_stride, value_size);
  }

  // Merge the warps; the ring is free once all have left the loop.
#pragma unroll
  for (int q = 0; q < 2; ++q) mass[q] = query_sum(mass[q]);
  if (lane_index() % 4 == 0) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      maxima[warp * kTileQueries + query_of(2 * q)] = highest[q];
      masses[warp * kTileQueries + query_of(2 * q)] = mass[q];
    }
  }
  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = query_of(2 * q);
    if (row >= query_rows) continue;
    float most = maxima[row];
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, maxima[w * kTileQueries + row]);
    const float factor = share(highest[q], most);
    float* to = sums + (warp * kTileQueries + row) * value_size + lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::Capacity / 8; ++n)
      if (S::has(n * 8, value_size))
        *reinterpret_cast<float2*>(to + n * 8) = make_float2(out[n][2 * q] * factor, out[n][2 * q + 1] * factor);
  }
  if (threadIdx.x < query_rows) {
    const int row = threadIdx.x;
    float most = maxima[row], total = 0.0f;
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, maxima[w * kTileQueries + row]);
    for (int w = 0; w < kWarps; ++w) total += masses[w * kTileQueries + row] * share(maxima[w * kTileQueries + row], most);
    if (a.splits > 1) {
      a.partial_state[state + row * a.splits] = make_float2(most, total);
    } else {
      factors[row] = normalizer(most, total, sink_of(a, sequence, first_row + row));
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < query_rows * value_size; e += kThreads) {
    const int row = e / value_size, d = e % value_size;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kTileQueries * value_size + e];
    if (a.splits > 1) {
      a.partial[(state + row * a.splits) * value_size + d] = total;
    } else {
      put(static_cast<T*>(a.out) + output_row(a, sequence, first_row + row) + d, total * factors[row]);
    }
  }
  // With one block a sequence, all who read its length have read it.
  if (a.store && a.splits == 1 && a.tiles == 1 && threadIdx.x == 0) a.lengths[sequence] = raised_length(a, sequence, stored);
}

// Merges the parts of one query row of one sequence.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_parts(const Attention a) {
  __shared__ float factors[kMostSplits];
  const int all_rows = a.groups * a.queries;
  const int sequence = blockIdx.x / all_rows, row = blockIdx.x % all_rows;
  const int64_t first = int64_t(blockIdx.x) * a.splits;
  const float2* states = a.partial_state + first;

  // Every warp does the same sums: there are few parts.
  float highest = negative_infinity(), mass = 0.0f;
  for (int i = lane_index(); i < a.splits; i += 32) highest = fmaxf(highest, states[i].x);
  for (int distance = 16; distance > 0; distance /= 2) highest = fmaxf(highest, across(highest, distance));
  for (int i = lane_index(); i < a.splits; i += 32) mass += states[i].y * share(states[i].x, highest);
  for (int distance = 16; distance > 0; distance /= 2) mass += across(mass, distance);
  const float scale = normalizer(highest, mass, sink_of(a, sequence, row));
  for (int i = threadIdx.x; i < a.splits; i += kMergeThreads) factors[i] = share(states[i].x, highest) * scale;
  __syncthreads();

  for (int d = threadIdx.x; d < a.value_size; d += kMergeThreads) {
    const float* from = a.partial + first * a.value_size + d;
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < a.splits; ++i) {
      // Parts beyond a sequence's end hold anything.
      const float part = from[int64_t(i) * a.value_size];
      total += factors[i] == 0.0f ? 0.0f : factors[i] * part;
    }
    put(static_cast<T*>(a.out) + output_row(a, sequence, row) + d, total);
  }
  if (a.store && row == 0 && threadIdx.x == 0) a.lengths[sequence] = raised_length(a, sequence, a.lengths[sequence]);
}

template <class T>
Shape attend_shape(const Attention& a, const Device& device) {
  const int warps = std::max(a.size, a.value_size) > 128 ? kAttendWarps<256> : kAttendWarps<128>;
  const int64_t strides = a.size + a.value_size + 2 * kVector<T>, rows = warps * kTileRows;
  const int64_t stage = rows * strides * sizeof(T), sums = rows * a.value_size * sizeof(float);
  const int64_t fixed = kTileQueries * ((a.size + kVector<T>) * sizeof(T) + (2 * warps + 1) * sizeof(float));
  // Loads under way hide the memory's latency: as long a ring as lets two blocks share a multiprocessor, else what fits.
  int64_t memory = 0;
  int ring = 4;
  for (; ring >= 1; --ring) {
    memory = fixed + std::max(ring * stage, sums);
    const bool two = 2 * (memory + kReservedMemory) <= device.multiprocessor_memory;
    if (memory <= device.block_memory && (two || ring <= 2)) break;
  }
  STD_TORCH_CHECK(ring >= 1, "head sizes ", a.size, " and ", a.value_size, " need more shared memory than this GPU has");
  const int64_t blocks = device.multiprocessor_memory / (memory + kReservedMemory);
  return {int(rows), ring, int(std::clamp<int64_t>(blocks, 1, 3)), memory};
}

template <class T>
void launch_attend(const Attention& a, const Shape& shape, const Device& device, cudaStream_t stream) {
  with_sizes<T>(a.size, a.value_size, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t blocks = a.sequences * a.tiles * a.splits;
    const int threads = kAttendWarps<S::Capacity> * 32;
    if (a.slots > 0) {
      launch<attend_part<T, S, true>>(device, stream, blocks, threads, shape.memory, a);
    } else {
      launch<attend_part<T, S, false>>(device, stream, blocks, threads, shape.memory, a);
    }
  });
  if (a.splits > 1) launch<merge_parts<T>>(device, stream, a.sequences * a.groups * a.queries, kMergeThreads, 0, a);
}

}  // namespace mixkv::cuda
