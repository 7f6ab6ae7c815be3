// window_scores: what the observation window attends to, head by head; and the norms of projected values, for importance.cpp.
#include <algorithm>

#include "importance.h"
#include "store.h"

namespace mixkv::cpu {

Tensor window_scores(Tensor query, Tensor key, std::optional<Tensor> valid, double scaling, bool squared, bool reduce_max,
                     double softcap, std::optional<Tensor> sinks) {
  const WindowShape shape(query, key, valid, sinks);
  query = row_dense(query);
  key = row_dense(key);
  const int64_t groups = shape.groups, candidates = shape.tokens - shape.window;
  Tensor out = torch::stable::new_empty(key, {shape.batch, shape.heads, candidates}, ScalarType::Float);
  if (candidates == 0) return out;

  const Kernels& set = kernels();
  const ElementKernels& kernel = set.of[element_of(key)];
  const int64_t bytes = key.element_size();
  const int64_t query_batch = query.stride(0) * bytes, query_head = query.stride(1) * bytes, query_row = query.stride(2);
  const int64_t key_batch = key.stride(0) * bytes, key_head = key.stride(1) * bytes, key_row = key.stride(2);
  const int64_t valid_batch = valid ? valid->stride(0) : 0, valid_head = valid ? valid->stride(1) : 0;
  const int64_t valid_row = valid ? valid->stride(2) : 0;
  const char* queries = data<char>(query);
  const char* keys = data<char>(key);
  const uint8_t* real = valid ? data<uint8_t>(*valid) : nullptr;
  const float* sink = sinks ? data<float>(*sinks) : nullptr;
  float* result = data<float>(out);
  const auto each = scratch(shape.batch * shape.query_heads * candidates);

  torch::stable::parallel_for(0, shape.batch * shape.query_heads, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(set.window_scratch(shape.tokens, int(shape.size)));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / shape.query_heads, head = item % shape.query_heads, h = head / groups;
      Window window{};
      window.query = queries + b * query_batch + head * query_head;
      window.query_stride = query_row;
      window.key = keys + b * key_batch + h * key_head;
      window.key_stride = key_row;
      window.valid = real ? real + b * valid_batch + h * valid_head : nullptr;
      window.valid_stride = valid_row;
      window.window = shape.window;
      window.tokens = shape.tokens;
      window.size = int(shape.size);
      window.scaling = float(scaling);
      window.softcap = float(softcap);
      window.has_sink = sink != nullptr;
      window.sink = sink ? sink[head] : 0.0f;
      window.squared = squared;
      kernel.window(window, each.get() + item * candidates, memory.get());
    }
  });
  torch::stable::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      float* to = result + s * candidates;
      std::copy_n(each.get() + s * groups * candidates, candidates, to);
      for (int64_t g = 1; g < groups; ++g) {
        const float* from = each.get() + (s * groups + g) * candidates;
        for (int64_t n = 0; n < candidates; ++n) to[n] = reduce_max ? std::max(to[n], from[n]) : to[n] + from[n];
      }
      if (!reduce_max)
        for (int64_t n = 0; n < candidates; ++n) to[n] /= float(groups);
    }
  });
  return out;
}

Tensor projected_norm(Tensor value, Tensor factor) {
  STD_TORCH_CHECK(value.dim() == 4 && factor.dim() == 3, "value must be [B, Hkv, N, D] and factor [Hkv, outputs, D]");
  const int64_t batch = value.size(0), heads = value.size(1), rows = value.size(2), size = value.size(3), outputs = factor.size(1);
  STD_TORCH_CHECK(factor.size(0) == heads && factor.size(2) == size, "factor must have the value's heads and head size");
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.is_contiguous(), "factor must be contiguous float32");
  STD_TORCH_CHECK(size > 0 && size % 16 == 0 && size <= 256, "the head size must be a multiple of 16 up to 256, is ", size);
  value = row_dense(value);
  Tensor out = torch::stable::new_empty(value, {batch, heads, rows}, ScalarType::Float);

  const Kernels& set = kernels();
  const ElementKernels& kernel = set.of[element_of(value)];
  const int64_t bytes = value.element_size();
  const int64_t value_batch = value.stride(0) * bytes, value_head = value.stride(1) * bytes, value_row = value.stride(2);
  const char* values = data<char>(value);
  const float* factors = data<float>(factor);
  float* result = data<float>(out);
  // Few heads still keep all threads busy; packing the factor anew for every part costs little beside its rows.
  constexpr int64_t kPart = 1024;
  const int64_t parts = (rows + kPart - 1) / kPart;
  torch::stable::parallel_for(0, batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(set.norm_scratch(outputs, int(size)));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / parts, first = item % parts * kPart, b = s / heads, h = s % heads;
      Projection projection{};
      projection.value = values + b * value_batch + h * value_head + first * value_row * bytes;
      projection.value_stride = value_row;
      projection.rows = std::min(kPart, rows - first);
      projection.factor = factors + h * outputs * size;
      projection.outputs = outputs;
      projection.size = int(size);
      kernel.norm(projection, result + s * rows + first, memory.get());
    }
  });
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("window_scores", TORCH_BOX(&mixkv::cpu::window_scores));
}
