// The parts of importance.cpp that other files have.
#pragma once

#include "../tensors.h"

namespace mixkv::cpu {

Tensor window_scores(Tensor query, Tensor key, std::optional<Tensor> valid, double scaling, bool squared, bool reduce_max,
                     double softcap, std::optional<Tensor> sinks);
Tensor projected_norm(Tensor value, Tensor factor);
Tensor row_norms(Tensor rows);

}  // namespace mixkv::cpu
