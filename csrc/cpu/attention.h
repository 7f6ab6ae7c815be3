#pragma once

#include "../tensors.h"

namespace mixkv::cpu {

Tensor attend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths, std::optional<Tensor> key_scale,
              std::optional<Tensor> value_scale, std::optional<Tensor> packed_key, std::optional<Tensor> packed_value,
              std::optional<Tensor> packed_starts, std::optional<Tensor> packed_lengths, std::optional<Tensor> packed_key_scale,
              std::optional<Tensor> packed_value_scale, int64_t max_length, double scaling, double softcap, std::optional<Tensor> sinks);

}  // namespace mixkv::cpu
