// step: a decode step of which the host knows no length.
#include <cstring>

#include "attention.h"
#include "store.h"

namespace mixkv::cpu {

static Tensor step(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths, Tensor ends,
                   Tensor evicted, Tensor key, Tensor value, int64_t max_length, double scaling, double softcap,
                   std::optional<Tensor> sinks) {
  const Store store(key_buffer, value_buffer, starts, lengths);
  check_ints(position_buffer, store.rows, "position_buffer");
  check_ints(ends, store.sequences, "ends");
  check_ints(evicted, store.sequences, "evicted");
  check_new(store, key_buffer, key, value);
  STD_TORCH_CHECK(key.size(2) == 1, "step takes one new row, not ", key.size(2));
  key = row_dense(key);
  value = row_dense(value);
  const Extents extents(store, starts, lengths, 1);
  const int32_t* end = data<int32_t>(ends);
  for (int64_t s = 0; s < store.sequences; ++s) {
    STD_TORCH_CHECK(extents.starts[s] + extents.lengths[s] < end[s] && end[s] <= store.rows, "sequence ", s, " (start ", extents.starts[s],
                    ", length ", extents.lengths[s], ", end ", end[s], ") has no room for another row");
  }
  const int64_t heads = key.size(1), bytes = key.element_size();
  const int64_t key_bytes = store.size * bytes, value_bytes = store.value_size * bytes;
  for (int64_t s = 0; s < store.sequences; ++s) {
    const int64_t b = s / heads, h = s % heads, row = extents.starts[s] + extents.lengths[s];
    std::memcpy(data<char>(key_buffer) + row * key_bytes, data<char>(key) + (b * key.stride(0) + h * key.stride(1)) * bytes, key_bytes);
    std::memcpy(data<char>(value_buffer) + row * value_bytes, data<char>(value) + (b * value.stride(0) + h * value.stride(1)) * bytes,
                value_bytes);
    int32_t& length = data<int32_t>(lengths)[s];
    data<int32_t>(position_buffer)[row] = length + data<int32_t>(evicted)[s];
    ++length;
  }
  return attend(query, key_buffer, value_buffer, starts, lengths, max_length, scaling, softcap, sinks);
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) { m.impl("step", TORCH_BOX(&mixkv::cpu::step)); }
