// row_norms, diversity: the length of rows and how alike they are, head by head.
#include <algorithm>
#include <tuple>

#include "importance.h"
#include "store.h"

namespace mixkv::cpu {

// Rows of one head that a thread takes at once.
constexpr int64_t kPart = 1024;

// Rows [B, Hkv, N, D] as the kernels take them.
struct Sequences {
  int64_t batch, heads, tokens, size;

  explicit Sequences(const Tensor& rows) {
    STD_TORCH_CHECK(rows.dim() == 4, "rows must be [B, Hkv, N, D]");
    batch = rows.size(0);
    heads = rows.size(1);
    tokens = rows.size(2);
    size = rows.size(3);
    STD_TORCH_CHECK(size > 0 && size % 16 == 0 && size <= 256, "the head size must be a multiple of 16 up to 256, is ", size);
    const int64_t bytes = rows.element_size();
    first = data<char>(rows);
    strides[0] = rows.stride(0) * bytes;
    strides[1] = rows.stride(1) * bytes;
    strides[2] = rows.stride(2);
    row_bytes = strides[2] * bytes;
  }

  int64_t count() const { return batch * heads; }

  // Rows first .. first + count of sequence s.
  Rows rows(int64_t s, int64_t first, int64_t count) const {
    Rows found{};
    found.data = this->first + s / heads * strides[0] + s % heads * strides[1] + first * row_bytes;
    found.stride = strides[2];
    found.count = count;
    found.size = int(size);
    return found;
  }

 private:
  const char* first;
  int64_t strides[3], row_bytes;
};

Tensor row_norms(Tensor rows) {
  rows = row_dense(rows);
  const Sequences all(rows);
  const int64_t count = all.tokens;
  Tensor out = torch::stable::new_empty(rows, {all.batch, all.heads, count}, ScalarType::Float);
  const ElementKernels& kernel = kernels().of[element_of(rows)];
  float* result = data<float>(out);
  const int64_t parts = (count + kPart - 1) / kPart;
  torch::stable::parallel_for(0, all.count() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / parts, first = item % parts * kPart;
      kernel.norms(all.rows(s, first, std::min(kPart, count - first)), result + s * count + first);
    }
  });
  return out;
}

// The cosine of each key with the mean direction of its head's valid keys, and the mean cosine between two of these.
static std::tuple<Tensor, Tensor> diversity(Tensor key, std::optional<Tensor> valid) {
  key = row_dense(key);
  const Sequences all(key);
  if (valid) check_mask(*valid, all.batch, all.heads, all.tokens, "valid");
  const int64_t count = all.tokens;
  Tensor similarity = torch::stable::new_empty(key, {all.batch, all.heads, count}, ScalarType::Float);
  Tensor redundancy = torch::stable::new_empty(key, {all.batch, all.heads}, ScalarType::Float);
  const ElementKernels& kernel = kernels().of[element_of(key)];
  const auto inverses = scratch(all.count() * count), means = scratch(all.count() * all.size);
  float *cosines = data<float>(similarity), *shares = data<float>(redundancy);
  const uint8_t* real = valid ? data<uint8_t>(*valid) : nullptr;
  torch::stable::parallel_for(0, all.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Rows rows = all.rows(s, 0, count);
      if (real) {
        rows.valid = real + s / all.heads * valid->stride(0) + s % all.heads * valid->stride(1);
        rows.valid_stride = valid->stride(2);
      }
      const float* mean = means.get() + s * all.size;
      const float found = float(kernel.direction(rows, inverses.get() + s * count, means.get() + s * all.size));
      float squares = 0.0f;
      for (int64_t d = 0; d < all.size; ++d) squares += mean[d] * mean[d];
      shares[s] = std::min(std::max((found * squares - 1.0f) / std::max(found - 1.0f, 1.0f), 0.0f), 1.0f);
    }
  });
  const int64_t parts = (count + kPart - 1) / kPart;
  torch::stable::parallel_for(0, all.count() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / parts, first = item % parts * kPart;
      kernel.cosines(all.rows(s, first, std::min(kPart, count - first)), means.get() + s * all.size, inverses.get() + s * count + first,
                     cosines + s * count + first);
    }
  });
  return {similarity, redundancy};
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("row_norms", TORCH_BOX(&mixkv::cpu::row_norms));
  m.impl("diversity", TORCH_BOX(&mixkv::cpu::diversity));
}
