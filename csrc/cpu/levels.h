// `LEVELS` of mixkv.ops.row_codes: what codes of 4 bits stand for.
#pragma once

#include <stdint.h>

namespace {

alignas(16) constexpr int8_t kLevels[16] = {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127};
// The largest of them in deviations of a normal distribution.
constexpr float kLargestLevel = 2.7326f;

}  // namespace
