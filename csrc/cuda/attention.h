// Arguments of the attention kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mixkv::cuda {

// Rows up to which a sequence is never cut: one launch then does everything.
constexpr int kWholeRows = 512;
// Parts that a sequence is cut into at most.
constexpr int kMostSplits = 256;

struct Strides {
  int64_t batch, head, row;
};

struct Attention {
  // [B, Hq, n, D]
  const void* query;
  Strides query_strides;
  // The store. Key, value, position and lengths are written only where `store` is set.
  void* key;
  void* value;
  int32_t* position;
  const int32_t* starts;
  int32_t* lengths;
  int64_t capacity;
  // Rows that follow the stored ones: [B, Hkv, new_rows, D], [B, Hkv, new_rows, Dv].
  const void* new_key;
  const void* new_value;
  Strides new_key_strides, new_value_strides;
  int new_rows;
  bool store;
  // The position of the first new row; where `evicted` is given, that of a row is its number in the sequence and evicted[s].
  int first_position;
  const int32_t* evicted;
  // The row of the store behind the room of each sequence; null: all reach to the end of the store.
  const int32_t* ends;
  // Which new rows a query sees: bool [B, n, new_rows] (`head` is its query stride), else causally, else all.
  const uint8_t* mask;
  Strides mask_strides;
  bool causal;
  // Chunks of rows that follow the stored ones, in place of new ones, each in room for `chunk` rows: where they begin in buffers
  // of `chunk_capacity` rows, and how many rows they have, [S, slots].
  const void* chunk_key;
  const void* chunk_value;
  const int32_t* blocks;
  const int32_t* block_rows;
  int64_t chunk_capacity;
  int slots, chunk_size;
  const float* sinks;
  // [B, n, Hq, Dv]
  void* out;
  // Of every sequence, query row and part: maximum and mass, and the sum of values.
  float2* partial_state;
  float* partial;

  int64_t sequences;
  int heads, groups, queries, size, value_size;
  float scaling, softcap;
  // Tiles of query rows; parts of `chunk` rows a sequence; stages in the ring.
  int tiles, splits, chunk, ring_stages;
};

// The row behind those that a sequence may have.
__device__ inline int64_t room_end(const Attention& a, int sequence) { return a.ends ? a.ends[sequence] : a.capacity; }

// Its length once the new rows are stored: without room they are not.
__device__ inline int raised_length(const Attention& a, int sequence, int stored) {
  const int64_t room = room_end(a, sequence) - a.starts[sequence];
  return a.ends && stored + a.new_rows > room ? stored : stored + a.new_rows;
}

struct Device {
  int index, multiprocessors, block_memory, multiprocessor_memory;
};

// What a kernel takes of the device.
struct Shape {
  int rows_per_stage, ring_stages, blocks_per_multiprocessor;
  int64_t memory;
};

template <class T>
Shape attend_shape(const Attention& attention, const Device& device);

template <class T>
void launch_attend(const Attention& attention, const Shape& shape, const Device& device, cudaStream_t stream);

}  // namespace mixkv::cuda
