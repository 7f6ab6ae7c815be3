#pragma once

#include "../tensors.h"

namespace mixkv::cuda {

void append(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths, std::optional<Tensor> key_scale,
            std::optional<Tensor> value_scale, Tensor key, Tensor value, int64_t first_position, std::optional<Tensor> valid);

}  // namespace mixkv::cuda
