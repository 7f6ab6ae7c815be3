// row_norms, mean_directions, mean_cosine, row_cosines: the length of rows and where they point to, head by head.
#include <algorithm>
#include <tuple>

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

static Tensor row_norms(Tensor rows) {
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

static std::tuple<Tensor, Tensor, Tensor> mean_directions(Tensor key, std::optional<Tensor> valid) {
  key = row_dense(key);
  const Sequences all(key);
  if (valid) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->dim() == 3 && valid->size(0) == all.batch &&
                        valid->size(1) == all.heads && valid->size(2) == all.tokens,
                    "valid must be a bool [B, Hkv, N] tensor");
  }
  Tensor inverse_norm = torch::stable::new_empty(key, {all.batch, all.heads, all.tokens}, ScalarType::Float);
  Tensor mean = torch::stable::new_empty(key, {all.batch, all.heads, all.size}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(key, {all.batch, all.heads}, ScalarType::Float);
  const ElementKernels& kernel = kernels().of[element_of(key)];
  float *inverses = data<float>(inverse_norm), *means = data<float>(mean), *found = data<float>(counts);
  const uint8_t* real = valid ? data<uint8_t>(*valid) : nullptr;
  torch::stable::parallel_for(0, all.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Rows rows = all.rows(s, 0, all.tokens);
      if (real) {
        rows.valid = real + s / all.heads * valid->stride(0) + s % all.heads * valid->stride(1);
        rows.valid_stride = valid->stride(2);
      }
      found[s] = float(kernel.direction(rows, inverses + s * all.tokens, means + s * all.size));
    }
  });
  return {inverse_norm, mean, counts};
}

static Tensor mean_cosine(Tensor mean, Tensor count) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.is_contiguous() && mean.dim() == 3,
                  "mean must be a contiguous float32 [B, Hkv, D] tensor");
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Float && count.is_contiguous() && count.dim() == 2 &&
                      count.size(0) == mean.size(0) && count.size(1) == mean.size(1),
                  "count must be a contiguous float32 [B, Hkv] tensor");
  Tensor out = torch::stable::new_empty(mean, {mean.size(0), mean.size(1)}, ScalarType::Float);
  const int64_t size = mean.size(2);
  const float *means = data<float>(mean), *counts = data<float>(count);
  for (int64_t s = 0; s < out.numel(); ++s) {
    float squares = 0.0f;
    for (int64_t d = 0; d < size; ++d) squares += means[s * size + d] * means[s * size + d];
    const float cosine = (counts[s] * squares - 1.0f) / std::max(counts[s] - 1.0f, 1.0f);
    data<float>(out)[s] = std::min(std::max(cosine, 0.0f), 1.0f);
  }
  return out;
}

static Tensor row_cosines(Tensor key, Tensor inverse_norm, Tensor mean) {
  key = row_dense(key);
  const Sequences all(key);
  const int64_t count = all.tokens;
  STD_TORCH_CHECK(inverse_norm.scalar_type() == ScalarType::Float && inverse_norm.is_contiguous() && inverse_norm.dim() == 3 &&
                      inverse_norm.numel() == all.count() * all.tokens,
                  "inverse_norm must be a contiguous float32 [B, Hkv, N] tensor");
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.is_contiguous() && mean.dim() == 3 &&
                      mean.numel() == all.count() * all.size,
                  "mean must be a contiguous float32 [B, Hkv, D] tensor");
  Tensor out = torch::stable::new_empty(key, {all.batch, all.heads, count}, ScalarType::Float);
  const ElementKernels& kernel = kernels().of[element_of(key)];
  const float *inverses = data<float>(inverse_norm), *means = data<float>(mean);
  float* result = data<float>(out);
  const int64_t parts = (count + kPart - 1) / kPart;
  torch::stable::parallel_for(0, all.count() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / parts, first = item % parts * kPart;
      kernel.cosines(all.rows(s, first, std::min(kPart, count - first)), means + s * all.size, inverses + s * all.tokens + first,
                     result + s * count + first);
    }
  });
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("row_norms", TORCH_BOX(&mixkv::cpu::row_norms));
  m.impl("mean_directions", TORCH_BOX(&mixkv::cpu::mean_directions));
  m.impl("mean_cosine", TORCH_BOX(&mixkv::cpu::mean_cosine));
  m.impl("row_cosines", TORCH_BOX(&mixkv::cpu::row_cosines));
}
