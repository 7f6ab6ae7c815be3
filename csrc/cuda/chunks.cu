// Operations on chunks of rows: chunk_scores, what their keys' products with a query cannot exceed; fetch_chunks, which copies chunks
// from the host's pinned memory as the device says, without the host's knowing which.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "place.h"
#include "softmax.cuh"

namespace mixkv::cuda {

constexpr int kScoreWarps = 8;
constexpr int kFetchThreads = 256;

__device__ inline float get(float x) { return x; }
__device__ inline float get(__half x) { return __half2float(x); }
__device__ inline float get(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Scores {
  // [S, G, D]
  const void* query;
  // [chunks, D]: the level of the largest element of each chunk's keys in the upper half of a code, the smallest's in the lower.
  const uint8_t* codes;
  // [S, 2, D]: a sequence's lowest level, and a step.
  const float* grid;
  const int32_t* starts;
  const int32_t* counts;
  // [S, longest]
  float* out;
  int64_t chunks, sequences;
  int groups, size, longest, blocks;
};

// A block takes a sequence's chunks in turns, a warp one at a time.
template <class T>
__global__ void __launch_bounds__(kScoreWarps * 32) score_chunks(const Scores a) {
  extern __shared__ float queries[];
  const int sequence = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks;
  const int width = a.groups * a.size;
  const T* query = static_cast<const T*>(a.query) + int64_t(sequence) * width;
  float* grid = queries + width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) queries[i] = get(query[i]);
  for (int i = threadIdx.x; i < 2 * a.size; i += blockDim.x) grid[i] = a.grid[int64_t(sequence) * 2 * a.size + i];
  __syncthreads();
  const int lane = threadIdx.x % 32, count = a.counts[sequence];
  for (int chunk = block * kScoreWarps + threadIdx.x / 32; chunk < a.longest; chunk += a.blocks * kScoreWarps) {
    const int64_t at = int64_t(a.starts[sequence]) + chunk;
    float most = negative_infinity();
    if (chunk < count && at < a.chunks) {
      const uint8_t* codes = a.codes + at * a.size;
      for (int g = 0; g < a.groups; ++g) {
        float total = 0.0f;
        for (int d = lane; d < a.size; d += 32) {
          const float q = queries[g * a.size + d], lowest = grid[d], step = grid[a.size + d];
          const int code = codes[d];
          total += fmaxf(q * (lowest + step * float(code >> 4)), q * (lowest + step * float(code & 15)));
        }
        for (int distance = 16; distance > 0; distance /= 2) total += across(total, distance);
        most = fmaxf(most, total);
      }
    }
    if (lane == 0) a.out[int64_t(sequence) * a.longest + chunk] = most;
  }
}

template <class T>
static void launch_scores(const Scores& a, const Place& place) {
  const int64_t memory = (int64_t(a.groups) + 2) * a.size * sizeof(float);
  STD_TORCH_CHECK(memory <= place.device().block_memory, a.groups, " query heads a KV head need more shared memory than this GPU has");
  launch<score_chunks<T>>(place.device(), place.stream(), a.sequences * a.blocks, kScoreWarps * 32, memory, a);
}

static Tensor chunk_scores(Tensor query, Tensor codes, Tensor grid, Tensor starts, Tensor counts, int64_t longest) {
  const Place place(query);
  place.check({&codes, &grid, &starts, &counts});
  const BoundsShape shape(query, codes, grid, starts, counts);
  query = torch::stable::contiguous(query);
  Tensor out = place.empty({shape.sequences, longest}, ScalarType::Float);
  Scores a{};
  a.query = data<void>(query);
  a.codes = data<uint8_t>(codes);
  a.grid = data<float>(grid);
  a.starts = data<int32_t>(starts);
  a.counts = data<int32_t>(counts);
  a.out = data<float>(out);
  a.chunks = shape.chunks;
  a.sequences = shape.sequences;
  a.groups = narrow(shape.groups);
  a.size = narrow(shape.size);
  a.longest = narrow(longest);
  // Enough blocks for every multiprocessor, and no more than there are chunks for.
  const int64_t wanted = (4 * int64_t(place.device().multiprocessors) + shape.sequences - 1) / shape.sequences;
  a.blocks = narrow(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, (longest + kScoreWarps - 1) / kScoreWarps)));
  if (longest == 0) return out;
  switch (query.scalar_type()) {
    case ScalarType::Float: launch_scores<float>(a, place); break;
    case ScalarType::Half: launch_scores<__half>(a, place); break;
    case ScalarType::BFloat16: launch_scores<__nv_bfloat16>(a, place); break;
    default: STD_TORCH_CHECK(false, "float32, float16 or bfloat16 expected");
  }
  return out;
}

struct Fetch {
  // Rows in units of 16 bytes.
  const uint4* from_key;
  const uint4* from_value;
  uint4* key;
  uint4* value;
  const int32_t* from_rows;
  const int32_t* to_rows;
  const int32_t* rows;
  int64_t from_capacity, capacity;
  int key_width, value_width, chunk;
};

// A block copies one chunk, whose rows follow one another on both sides.
__global__ void __launch_bounds__(kFetchThreads) fetch_chunk(const Fetch a) {
  const int64_t from = a.from_rows[blockIdx.x], to = a.to_rows[blockIdx.x];
  const int rows = min(a.rows[blockIdx.x], a.chunk);
  if (rows <= 0 || from < 0 || to < 0 || from + rows > a.from_capacity || to + rows > a.capacity) return;
  const uint4* from_key = a.from_key + from * a.key_width;
  const uint4* from_value = a.from_value + from * a.value_width;
  uint4* key = a.key + to * a.key_width;
  uint4* value = a.value + to * a.value_width;
  const int keys = rows * a.key_width, all = keys + rows * a.value_width;
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += kFetchThreads) {
    if (i < keys) {
      key[i] = from_key[i];
    } else {
      value[i - keys] = from_value[i - keys];
    }
  }
}

// The device's view of a tensor here or in the host's pinned memory.
static const uint4* readable(const Tensor& tensor, const Place& place) {
  if (tensor.is_cuda()) {
    place.check({&tensor});
    return static_cast<const uint4*>(tensor.data_ptr());
  }
  void* found = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&found, tensor.data_ptr(), 0);
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "chunks in the host's memory must be pinned: ", cudaGetErrorString(error));
  return static_cast<const uint4*>(found);
}

static void fetch_chunks(Tensor key_buffer, Tensor value_buffer, Tensor from_key, Tensor from_value, Tensor from_rows, Tensor to_rows,
                         Tensor rows, int64_t chunk) {
  const Place place(key_buffer);
  place.check({&value_buffer, &from_rows, &to_rows, &rows});
  for (const auto& [to, from] : {std::pair(&key_buffer, &from_key), std::pair(&value_buffer, &from_value)}) {
    check_flat(*to, "buffers");
    check_flat(*from, "chunks");
    STD_TORCH_CHECK(to->scalar_type() == from->scalar_type() && to->size(1) == from->size(1), "chunks must be like the buffers' rows");
  }
  STD_TORCH_CHECK(key_buffer.size(0) == value_buffer.size(0) && from_key.size(0) == from_value.size(0),
                  "there must be as many keys as values");
  for (const Tensor* ints : {&from_rows, &to_rows, &rows}) {
    STD_TORCH_CHECK(ints->scalar_type() == ScalarType::Int && ints->is_contiguous() && ints->numel() == rows.numel(),
                    "from_rows, to_rows and rows must be contiguous int32 [S, K] tensors");
  }
  check_aligned(key_buffer, "key_buffer");
  check_aligned(value_buffer, "value_buffer");
  check_aligned(from_key, "from_key");
  check_aligned(from_value, "from_value");
  Fetch a{};
  a.from_key = readable(from_key, place);
  a.from_value = readable(from_value, place);
  a.key = data<uint4>(key_buffer);
  a.value = data<uint4>(value_buffer);
  a.from_rows = data<int32_t>(from_rows);
  a.to_rows = data<int32_t>(to_rows);
  a.rows = data<int32_t>(rows);
  a.from_capacity = from_key.size(0);
  a.capacity = key_buffer.size(0);
  const int64_t bytes = key_buffer.element_size();
  a.key_width = narrow(key_buffer.size(1) * bytes / 16);
  a.value_width = narrow(value_buffer.size(1) * bytes / 16);
  a.chunk = narrow(chunk);
  launch<fetch_chunk>(place.device(), place.stream(), rows.numel(), kFetchThreads, 0, a);
}

}  // namespace mixkv::cuda

STABLE_TORCH_LIBRARY_IMPL(mixkv, CUDA, m) {
  m.impl("chunk_scores", TORCH_BOX(&mixkv::cuda::chunk_scores));
  m.impl("fetch_chunks", TORCH_BOX(&mixkv::cuda::fetch_chunks));
}
