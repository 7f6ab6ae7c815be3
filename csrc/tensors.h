// Checks and shapes that the operations on the CPU and on CUDA share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace mixkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_row_dense(const Tensor& tensor) { return tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1; }

// A tensor whose last dimension is contiguous.
inline Tensor row_dense(const Tensor& tensor) { return is_row_dense(tensor) ? tensor : torch::stable::contiguous(tensor); }

inline void check_ints(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.is_contiguous(), name,
                  " must be a contiguous int32 vector");
  STD_TORCH_CHECK(count < 0 || tensor.numel() == count, name, " must have ", count, " entries, has ", tensor.numel());
}

inline bool is_floating(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_flat(const Tensor& buffer, const char* name, bool coded = false) {
  STD_TORCH_CHECK(buffer.dim() == 2 && buffer.is_contiguous(), name, " must be a contiguous [rows, size] tensor");
  if (buffer.scalar_type() == ScalarType::Byte && coded) {
    STD_TORCH_CHECK(buffer.size(1) > 0 && buffer.size(1) % 8 == 0 && buffer.size(1) <= 128, name,
                    ": the head size must be a multiple of 16 up to 256, is ", 2 * buffer.size(1));
    return;
  }
  if (coded) {
    STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Char, name, " with scales must be int8 or uint8");
  } else {
    STD_TORCH_CHECK(is_floating(buffer), name, " must be float32, float16 or bfloat16");
  }
  STD_TORCH_CHECK(buffer.size(1) > 0 && buffer.size(1) % 16 == 0 && buffer.size(1) <= 256, name,
                  ": the head size must be a multiple of 16 up to 256, is ", buffer.size(1));
}

// The float16 scale of each row; or none.
inline void check_scale(const std::optional<Tensor>& scale, int64_t rows, const char* name) {
  if (!scale) return;
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Half && scale->dim() == 1 && scale->is_contiguous() && scale->numel() == rows, name,
                  " must be a contiguous float16 vector with an entry for each of ", rows, " rows");
}

// Flat storage of S sequences. Rows with scales are codes in int8, or in uint8 two to a byte.
struct Store {
  int64_t sequences, rows, size, value_size;
  bool coded;

  Store(const Tensor& key, const Tensor& value, const Tensor& starts, const Tensor& lengths, const std::optional<Tensor>& key_scale,
        const std::optional<Tensor>& value_scale)
      : coded(key_scale.has_value()) {
    STD_TORCH_CHECK(key_scale.has_value() == value_scale.has_value(), "keys and values must both have scales, or neither");
    check_flat(key, "key_buffer", coded);
    check_flat(value, "value_buffer", coded);
    check_scale(key_scale, key.size(0), "key_scale");
    check_scale(value_scale, value.size(0), "value_scale");
    check_ints(starts, -1, "starts");
    check_ints(lengths, starts.numel(), "lengths");
    STD_TORCH_CHECK(key.scalar_type() == value.scalar_type(), "key_buffer and value_buffer must have one dtype");
    STD_TORCH_CHECK(key.size(0) == value.size(0), "key_buffer and value_buffer must have the same number of rows");
    sequences = starts.numel();
    rows = key.size(0);
    size = key.size(1);
    value_size = value.size(1);
  }
};

// New rows [B, Hkv, n, D], [B, Hkv, n, Dv] that belong to a store.
inline void check_new(const Store& store, const Tensor& key_buffer, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "key and value must be [B, Hkv, n, size]");
  STD_TORCH_CHECK(key.size(0) * key.size(1) == store.sequences, "key has ", key.size(0) * key.size(1),
                  " sequences, the store ", store.sequences);
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(key.size(d) == value.size(d), "key and value must agree in all but their last dimension");
  STD_TORCH_CHECK(key.size(3) == store.size && value.size(3) == store.value_size, "new rows must be as wide as the store's");
  STD_TORCH_CHECK(store.coded ? is_floating(key) : key.scalar_type() == key_buffer.scalar_type(), "new rows must have the store's dtype");
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type(), "key and value must have one dtype");
}

// Query heads over the store's sequences.
struct Heads {
  int64_t batch, query_heads, heads, groups, rows;

  Heads(const Store& store, const Tensor& query, const Tensor& key_buffer, const std::optional<Tensor>& sinks) {
    STD_TORCH_CHECK(query.dim() == 4 && query.size(3) == store.size, "query must be [B, Hq, n, D] with the store's D = ", store.size);
    STD_TORCH_CHECK(store.coded ? is_floating(query) : query.scalar_type() == key_buffer.scalar_type(), "query must have the store's dtype");
    batch = query.size(0);
    query_heads = query.size(1);
    rows = query.size(2);
    STD_TORCH_CHECK(batch > 0 && store.sequences % batch == 0 && store.sequences > 0, "the store's ", store.sequences,
                    " sequences do not divide into ", batch, " batch rows");
    heads = store.sequences / batch;
    STD_TORCH_CHECK(query_heads % heads == 0, query_heads, " query heads do not divide into ", heads, " KV heads");
    groups = query_heads / heads;
    if (sinks) {
      STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->is_contiguous() &&
                          sinks->numel() == query_heads,
                      "sinks must be a contiguous float32 [Hq] tensor");
    }
  }
};

// The chunks [S, K] that each sequence has chosen, in buffers of their own.
struct Chosen {
  int64_t most, rows, chunk;

  Chosen(const Store& store, const Tensor& key_buffer, const Tensor& key, const Tensor& value, const Tensor& blocks,
         const Tensor& block_rows, int64_t chunk)
      : most(0), rows(key.size(0)), chunk(chunk) {
    check_flat(key, "chunk_key");
    check_flat(value, "chunk_value");
    STD_TORCH_CHECK(key.scalar_type() == key_buffer.scalar_type() && value.scalar_type() == key_buffer.scalar_type(),
                    "chunks must have the store's dtype");
    STD_TORCH_CHECK(key.size(1) == store.size && value.size(1) == store.value_size && value.size(0) == rows,
                    "chunks must be as wide as the store's rows, and have as many keys as values");
    for (const Tensor* ints : {&blocks, &block_rows}) {
      STD_TORCH_CHECK(ints->scalar_type() == ScalarType::Int && ints->dim() == 2 && ints->is_contiguous() &&
                          ints->size(0) == store.sequences && ints->size(1) == blocks.size(1),
                      "blocks and block_rows must be contiguous int32 [S, K] tensors");
    }
    STD_TORCH_CHECK(chunk > 0, "a chunk must have rows");
    most = blocks.size(1);
  }
};

// Query heads over the bounds of S sequences' chunks: codes [chunks, D], grid [S, 2, D].
struct BoundsShape {
  int64_t batch, query_heads, groups, sequences, chunks, size;

  BoundsShape(const Tensor& query, const Tensor& codes, const Tensor& grid, const Tensor& starts, const Tensor& counts) {
    check_ints(starts, -1, "starts");
    check_ints(counts, starts.numel(), "counts");
    STD_TORCH_CHECK(query.dim() == 4 && query.size(2) == 1, "query must be [B, Hq, 1, D]");
    batch = query.size(0);
    query_heads = query.size(1);
    size = query.size(3);
    sequences = starts.numel();
    STD_TORCH_CHECK(size > 0 && size % 16 == 0 && size <= 256, "the head size must be a multiple of 16 up to 256, is ", size);
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.is_contiguous() && codes.size(1) == size,
                    "codes must be a contiguous uint8 [chunks, D] tensor");
    STD_TORCH_CHECK(grid.scalar_type() == ScalarType::Float && grid.dim() == 3 && grid.is_contiguous() && grid.size(0) == sequences &&
                        grid.size(1) == 2 && grid.size(2) == size,
                    "grid must be a contiguous float32 [S, 2, D] tensor");
    STD_TORCH_CHECK(sequences > 0 && batch * query_heads % sequences == 0, "the query heads do not divide into ", sequences, " sequences");
    groups = batch * query_heads / sequences;
    chunks = codes.size(0);
  }
};

// Which tokens [B, Hkv, N] count.
inline void check_mask(const Tensor& mask, int64_t batch, int64_t heads, int64_t tokens, const char* name) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 3 && mask.size(0) == batch && mask.size(1) == heads &&
                      mask.size(2) == tokens,
                  name, " must be a bool [B, Hkv, tokens] tensor");
}

// Observation window [B, Hq, W, D] over keys [B, Hkv, N, D].
struct WindowShape {
  int64_t batch, query_heads, heads, groups, window, tokens, size;

  WindowShape(const Tensor& query, const Tensor& key, const std::optional<Tensor>& valid, const std::optional<Tensor>& sinks) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query must be [B, Hq, W, D] and key [B, Hkv, N, D]");
    batch = query.size(0);
    query_heads = query.size(1);
    window = query.size(2);
    size = query.size(3);
    heads = key.size(1);
    tokens = key.size(2);
    STD_TORCH_CHECK(key.size(0) == batch && key.size(3) == size && heads > 0 && query_heads % heads == 0,
                    "query and key must agree in batch and head size, and Hq be a multiple of Hkv");
    STD_TORCH_CHECK(window > 0 && window <= tokens, "the window must have 1 .. N queries, has ", window);
    STD_TORCH_CHECK(size > 0 && size % 16 == 0 && size <= 256, "the head size must be a multiple of 16 up to 256, is ", size);
    STD_TORCH_CHECK(query.scalar_type() == key.scalar_type(), "query and key must have one dtype");
    groups = query_heads / heads;
    if (valid) {
      STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->dim() == 3 && valid->size(0) == batch &&
                          valid->size(1) == heads && valid->size(2) == tokens,
                      "valid must be a bool [B, Hkv, N] tensor");
    }
    if (sinks) {
      STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->is_contiguous() &&
                          sinks->numel() == query_heads,
                      "sinks must be a contiguous float32 [Hq] tensor");
    }
  }
};

}  // namespace mixkv
