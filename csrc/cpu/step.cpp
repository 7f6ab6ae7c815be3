// step: a decode step of which the host knows no length.
#include "attention.h"
#include "rows.h"
#include "store.h"

namespace mixkv::cpu {

static Tensor step(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor ends, Tensor evicted, Tensor key,
                   Tensor value, int64_t max_length, double scaling, double softcap, std::optional<Tensor> sinks) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  check_ints(ends, store.sequences, "ends");
  check_ints(evicted, store.sequences, "evicted");
  STD_TORCH_CHECK(key.dim() == 4 && key.size(2) == 1, "step takes one new row");
  const Extents extents(store, starts, lengths, 1);
  const int32_t* end = data<int32_t>(ends);
  for (int64_t s = 0; s < store.sequences; ++s) {
    STD_TORCH_CHECK(extents.starts[s] + extents.lengths[s] < end[s] && end[s] <= store.rows, "sequence ", s, " (start ", extents.starts[s],
                    ", length ", extents.lengths[s], ", end ", end[s], ") has no room for another row");
  }
  append(key_buffer, value_buffer, position_buffer, starts, lengths, key_scale, value_scale, key, value, 0, std::nullopt);
  for (int64_t s = 0; s < store.sequences; ++s) {
    const int32_t before = extents.lengths[s] - 1;
    data<int32_t>(position_buffer)[extents.starts[s] + before] = before + data<int32_t>(evicted)[s];
  }
  return attend(query, key_buffer, value_buffer, starts, lengths, key_scale, value_scale, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                std::nullopt, std::nullopt, max_length, scaling, softcap, sinks);
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) { m.impl("step", TORCH_BOX(&mixkv::cpu::step)); }
