// Starting kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>

#include "attention.h"

namespace mixkv::cuda {

// What the system takes of a multiprocessor's shared memory for each block.
constexpr int64_t kReservedMemory = 1024;

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Lets a kernel use all the shared memory a block can have. Once for each device.
template <auto Kernel>
void allow_memory(const Device& device) {
  static std::atomic<uint64_t> done[4];
  std::atomic<uint64_t>& word = done[device.index / 64 % 4];
  const uint64_t bit = uint64_t(1) << device.index % 64;
  if (word.load(std::memory_order_relaxed) & bit) return;
  check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_memory));
  check(cudaFuncSetAttribute(Kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  word.fetch_or(bit, std::memory_order_relaxed);
}

template <auto Kernel, class... Arguments>
void launch(const Device& device, cudaStream_t stream, int64_t blocks, int threads, int64_t memory, const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "too many blocks of threads: ", blocks);
  if (memory > 0) allow_memory<Kernel>(device);
  Kernel<<<static_cast<unsigned>(blocks), threads, memory, stream>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace mixkv::cuda
