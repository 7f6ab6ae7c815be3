// Arguments of the observation-window kernels.
#pragma once

#include "attention.h"

namespace mixkv::cuda {

struct Window {
  // [B, Hq, W, D] and [B, Hkv, N, D]; valid [B, Hkv, N].
  const void* query;
  const void* key;
  Strides query_strides, key_strides;
  const uint8_t* valid;
  Strides valid_strides;
  const float* sinks;
  // [B, Hkv, N - W]
  float* out;
  // Of every sequence, block of tokens and query row: maximum and mass.
  float2* states;
  // Of every sequence and query row: the logarithm of the whole mass.
  float* totals;

  int64_t sequences;
  int heads, groups, window, tokens, size;
  // Query rows are padded to whole tiles, head by head.
  int tiles_per_head, token_blocks;
  float scaling, softcap;
  // squared: the root mean square over the window, not the mean.
  bool squared, reduce_max;
};

// Tokens that a block of threads takes, for a head size.
constexpr int window_block_tokens(int size) { return size > 128 ? 64 : 128; }

template <class T>
void launch_window(const Window& window, const Device& device, cudaStream_t stream);

}  // namespace mixkv::cuda
