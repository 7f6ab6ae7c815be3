// window_scores: what the observation window attends to.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "place.h"
#include "window.h"

namespace mixkv::cuda {

static Tensor window_scores(Tensor query, Tensor key, std::optional<Tensor> valid, double scaling, bool squared, bool reduce_max,
                            double softcap, std::optional<Tensor> sinks) {
  const Place place(query);
  place.check({&key});
  place.check(valid);
  place.check(sinks);
  const WindowShape shape(query, key, valid, sinks);
  Tensor out = place.empty({shape.batch, shape.heads, shape.tokens - shape.window}, ScalarType::Float);
  if (out.numel() == 0 || shape.groups == 0) return out;
  query = vector_rows(query);
  key = vector_rows(key);

  Window w{};
  w.query = data<void>(query);
  w.key = data<void>(key);
  w.query_strides = strides_of(query);
  w.key_strides = strides_of(key);
  if (valid) {
    w.valid = data<uint8_t>(*valid);
    w.valid_strides = strides_of(*valid);
  }
  w.sinks = data<float>(sinks);
  w.out = data<float>(out);
  w.sequences = shape.batch * shape.heads;
  w.heads = narrow(shape.heads);
  w.groups = narrow(shape.groups);
  w.window = narrow(shape.window);
  w.tokens = narrow(shape.tokens);
  w.size = narrow(shape.size);
  w.tiles_per_head = (w.window + 15) / 16;
  const int block_tokens = window_block_tokens(w.size);
  w.token_blocks = (w.tokens + block_tokens - 1) / block_tokens;
  w.scaling = static_cast<float>(scaling);
  w.softcap = static_cast<float>(softcap);
  w.squared = squared;
  w.reduce_max = reduce_max;

  const int64_t rows = w.sequences * w.groups * w.tiles_per_head * 16;
  const Tensor work = place.empty({rows * (2 * int64_t(w.token_blocks) + 1)}, ScalarType::Float);
  w.states = data<float2>(work);
  w.totals = data<float>(work) + rows * w.token_blocks * 2;
  switch (key.scalar_type()) {
    case ScalarType::Float: launch_window<float>(w, place.device(), place.stream()); break;
    case ScalarType::Half: launch_window<__half>(w, place.device(), place.stream()); break;
    case ScalarType::BFloat16: launch_window<__nv_bfloat16>(w, place.device(), place.stream()); break;
    default: STD_TORCH_CHECK(false, "float32, float16 or bfloat16 expected");
  }
  return out;
}

}  // namespace mixkv::cuda

STABLE_TORCH_LIBRARY_IMPL(mixkv, CUDA, m) { m.impl("window_scores", TORCH_BOX(&mixkv::cuda::window_scores)); }
