// Views of flat storage for code on the CPU.
#pragma once

#include "../tensors.h"
#include "kernels.h"

#include <cstdlib>
#include <memory>

namespace mixkv {

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Half: return kHalf;
    case ScalarType::BFloat16: return kBfloat16;
    default: STD_TORCH_CHECK(false, "float32, float16 or bfloat16 expected");
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Starts and lengths on the host, checked against the buffers: what lies outside is never touched.
struct Extents {
  const int32_t* starts;
  const int32_t* lengths;
  int64_t total = 0;

  Extents(const Store& store, const Tensor& starts_tensor, const Tensor& lengths_tensor, int64_t extra = 0)
      : starts(data<int32_t>(starts_tensor)), lengths(data<int32_t>(lengths_tensor)) {
    for (int64_t s = 0; s < store.sequences; ++s) {
      STD_TORCH_CHECK(starts[s] >= 0 && lengths[s] >= 0 && starts[s] + lengths[s] + extra <= store.rows, "sequence ", s, " (start ",
                      starts[s], ", length ", lengths[s], ", new rows ", extra, ") reaches beyond the buffer of ", store.rows, " rows");
      total += lengths[s];
    }
  }
};

struct Freed {
  void operator()(float* memory) const { std::free(memory); }
};

// Uninitialised, on cache lines of its own.
inline std::unique_ptr<float[], Freed> scratch(int64_t floats) {
  const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes");
  return std::unique_ptr<float[], Freed>(memory);
}

}  // namespace mixkv
