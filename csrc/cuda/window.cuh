// What the observation window's queries attend to, in two passes over the keys: the first finds every query's softmax mass, the
// second adds up the shares. Logits are computed twice and never stored.
//
// A query row is head g of the KV head's G at window position w. Rows are padded to tiles of 16, each of one head. A warp holds 16
// tokens' keys and meets all query rows; a block's warps share the queries.
#pragma once

#include <algorithm>

#include "launch.h"
#include "softmax.cuh"
#include "tile.cuh"
#include "window.h"

namespace mixkv::cuda {

// Query rows in shared memory at a time.
constexpr int kStagedQueries = 32;
constexpr int kTotalRows = 32;
constexpr int kTotalSlices = 8;

template <class S>
constexpr int kWindowWarps = window_block_tokens(S::Capacity) / kTileRows;

template <class T, class S, bool Second>
__global__ void __launch_bounds__(kWindowWarps<S> * 32) window_pass(const Window w) {
  constexpr int kWarps = kWindowWarps<S>, kThreads = kWarps * 32, kTokens = kWarps * kTileRows;
  const int size = S::Exact ? S::Capacity : w.size, stride = size + kVector<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* keys = reinterpret_cast<T*>(shared);
  T* queries = keys + kTokens * stride;
  float2* states = reinterpret_cast<float2*>(queries + kStagedQueries * stride);

  const int64_t sequence = blockIdx.x / w.token_blocks;
  const int token_block = blockIdx.x % w.token_blocks, batch = sequence / w.heads, head = sequence % w.heads;
  const int candidates = w.tokens - w.window, warp = threadIdx.x / 32;
  const int tiles = w.groups * w.tiles_per_head, rows = tiles * kTileQueries;
  const T* query = static_cast<const T*>(w.query) + batch * w.query_strides.batch + head * w.groups * w.query_strides.head;
  const T* key = static_cast<const T*>(w.key) + batch * w.key_strides.batch + head * w.key_strides.head;

  copy_rows<T, kTokens, kThreads>(keys, stride, size, key, [&](int i) -> const T* {
    const int token = token_block * kTokens + i;
    return token < w.tokens ? key + token * w.key_strides.row : nullptr;
  });

  // The lane's four tokens: row_of(0), row_of(1), row_of(4), row_of(5).
  const int first_token = token_block * kTokens + warp * kTileRows;
  bool real[4];
  float share_sum[4] = {}, result[4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int token = first_token + row_of(c / 2 * 4 + c % 2);
    real[c] = token < w.tokens &&
              (w.valid == nullptr || w.valid[batch * w.valid_strides.batch + head * w.valid_strides.head + token * w.valid_strides.row]);
  }

  const Scale scale{w.scaling, w.softcap};
  HeldKeys<T, S> held;
  for (int first_row = 0; first_row < rows; first_row += kStagedQueries) {
    copy_rows<T, kStagedQueries, kThreads>(queries, stride, size, query, [&](int i) -> const T* {
      const int tile = (first_row + i) / kTileQueries, position = tile % w.tiles_per_head * kTileQueries + i % kTileQueries;
      if (tile >= tiles || position >= w.window) return nullptr;
      return query + tile / w.tiles_per_head * w.query_strides.head + position * w.query_strides.row;
    });
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    if (first_row == 0) held.load(keys + warp * kTileRows * stride, stride, size);

    for (int staged = 0; staged < kStagedQueries && first_row + staged < rows; staged += kTileQueries) {
      const int tile = (first_row + staged) / kTileQueries, first_position = tile % w.tiles_per_head * kTileQueries;
      float logits[8] = {};
      held.multiply(logits, queries + staged * stride, stride, size);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int token = first_token + row_of(i), position = first_position + query_of(i);
        const bool seen = real[i / 4 * 2 + i % 2] && token - candidates <= position;
        logits[i] = seen ? scale(logits[i]) : negative_infinity();
      }
      if constexpr (Second) {
        const float* totals = w.totals + sequence * rows + first_row + staged;
        const float total[2] = {totals[query_of(0)], totals[query_of(2)]};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float x = share(logits[i], total[i / 2 % 2]);
          share_sum[i / 4 * 2 + i % 2] += w.squared ? x * x : x;
        }
        if (tile % w.tiles_per_head == w.tiles_per_head - 1) {
          const bool first_head = tile < w.tiles_per_head;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float x = share_sum[c];
            for (int distance = 4; distance < 32; distance *= 2) x += across(x, distance);
            x /= w.window;
            if (w.squared) x = sqrtf(x);
            result[c] = first_head ? x : w.reduce_max ? fmaxf(result[c], x) : result[c] + x;
            share_sum[c] = 0.0f;
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float most = query_maximum(fmaxf(fmaxf(logits[2 * q], logits[2 * q + 1]), fmaxf(logits[2 * q + 4], logits[2 * q + 5])));
          const float mass = query_sum(share(logits[2 * q], most) + share(logits[2 * q + 1], most) + share(logits[2 * q + 4], most) +
                                       share(logits[2 * q + 5], most));
          if (lane_index() % 4 == 0) states[warp * kStagedQueries + staged + query_of(2 * q)] = make_float2(most, mass);
        }
      }
    }
    // All are done with the queries, and the states are written.
    __syncthreads();
    if constexpr (!Second) {
      if (threadIdx.x < kStagedQueries && first_row + threadIdx.x < rows) {
        float most = negative_infinity(), mass = 0.0f;
        for (int i = 0; i < kWarps; ++i) most = fmaxf(most, states[i * kStagedQueries + threadIdx.x].x);
        for (int i = 0; i < kWarps; ++i) {
          const float2 state = states[i * kStagedQueries + threadIdx.x];
          mass += state.y * share(state.x, most);
        }
        w.states[(sequence * w.token_blocks + token_block) * rows + first_row + threadIdx.x] = make_float2(most, mass);
      }
    }
  }

  if constexpr (Second) {
    if (lane_index() >= 4) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = first_token + row_of(c / 2 * 4 + c % 2);
      if (token < candidates) w.out[sequence * candidates + token] = w.reduce_max ? result[c] : result[c] / w.groups;
    }
  }
}

// Takes a query row's part into a maximum and mass.
__device__ inline void take_part(float2& into, float2 part) {
  const float most = fmaxf(into.x, part.x);
  into.y = into.y * share(into.x, most) + part.y * share(part.x, most);
  into.x = most;
}

// Merges the first pass's states. Rows of padding, and queries that see nothing, get an infinite mass: their shares are 0.
static __global__ void __launch_bounds__(kTotalRows * kTotalSlices) window_totals(const Window w) {
  __shared__ float2 parts[kTotalSlices][kTotalRows];
  const int rows = w.groups * w.tiles_per_head * kTileQueries, row_blocks = (rows + kTotalRows - 1) / kTotalRows;
  const int64_t sequence = blockIdx.x / row_blocks;
  const int lane = threadIdx.x % kTotalRows, slice = threadIdx.x / kTotalRows, row = blockIdx.x % row_blocks * kTotalRows + lane;
  float2 total = make_float2(negative_infinity(), 0.0f);
  if (row < rows)
    for (int i = slice; i < w.token_blocks; i += kTotalSlices)
      take_part(total, w.states[(sequence * w.token_blocks + i) * rows + row]);
  parts[slice][lane] = total;
  __syncthreads();
  if (slice > 0 || row >= rows) return;
  for (int i = 1; i < kTotalSlices; ++i) take_part(total, parts[i][lane]);
  const int tile = row / kTileQueries, group = tile / w.tiles_per_head;
  const bool real = tile % w.tiles_per_head * kTileQueries + row % kTileQueries < w.window && total.x != negative_infinity();
  if (real && w.sinks) take_part(total, make_float2(w.sinks[sequence % w.heads * w.groups + group] * kLog2e, 1.0f));
  w.totals[sequence * rows + row] = real ? total.x + log2f(total.y) : -negative_infinity();
}

template <class T>
void launch_window(const Window& w, const Device& device, cudaStream_t stream) {
  with_sizes<T>(w.size, w.size, [&](auto sizes) {
    using S = decltype(sizes);
    constexpr int kTokens = window_block_tokens(S::Capacity), kThreads = kWindowWarps<S> * 32;
    const int64_t memory =
        (kTokens + kStagedQueries) * (w.size + kVector<T>) * sizeof(T) + kWindowWarps<S> * kStagedQueries * sizeof(float2);
    STD_TORCH_CHECK(memory <= device.block_memory, "head size ", w.size, " needs more shared memory than this GPU has");
    const int rows = w.groups * w.tiles_per_head * kTileQueries;
    launch<window_pass<T, S, false>>(device, stream, w.sequences * w.token_blocks, kThreads, memory, w);
    launch<window_totals>(device, stream, w.sequences * ((rows + kTotalRows - 1) / kTotalRows), kTotalRows * kTotalSlices, 0, w);
    Window second = w;
    second.token_blocks = (w.tokens - w.window + kTokens - 1) / kTokens;
    launch<window_pass<T, S, true>>(device, stream, second.sequences * second.token_blocks, kThreads, memory, second);
  });
}

}  // namespace mixkv::cuda
