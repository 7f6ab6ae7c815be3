// Where an operation runs: the tensors' device, made the current one, and torch's current stream on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>

#include "../tensors.h"
#include "launch.h"

namespace mixkv::cuda {

class Place {
 public:
  explicit Place(const Tensor& tensor);

  // All of them must be here.
  void check(std::initializer_list<const Tensor*> tensors) const;
  void check(const std::optional<Tensor>& tensor) const;

  // Uninitialised, contiguous.
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const;

  const Device& device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Device& device_;
  cudaStream_t stream_;
};

// The tensor, or a copy of it, such that its last dimension is dense and every 16 bytes of it can be read at once.
Tensor vector_rows(const Tensor& tensor);

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Of the first three dimensions, in elements.
inline Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

inline void check_aligned(const Tensor& buffer, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(buffer.data_ptr()) % 16 == 0, name, " must begin at a multiple of 16 bytes");
}

inline void refuse_codes(const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(!scale, "there are no compiled operations on rows of codes for CUDA");
}

// Sizes that kernels hold in 32 bits.
inline int narrow(int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size < int64_t(1) << 30, size, " is too large");
  return static_cast<int>(size);
}

}  // namespace mixkv::cuda
