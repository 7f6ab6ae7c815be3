// Operations that copy rows: append, compact, move_rows. Rows are copied as bytes, 16 at a time.
#include "rows.h"

#include <algorithm>

#include "place.h"

namespace mixkv::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Rows that a warp copies at once, and a block.
constexpr int kRowsOfWarp = 4;
constexpr int kRowsOfBlock = 64;

// Rows of keys and values in units of 16 bytes.
struct RowSource {
  const uint4* key;
  const uint4* value;
  Strides key_strides, value_strides;
};

struct RowTarget {
  uint4* key;
  uint4* value;
  int32_t* position;
  const int32_t* starts;
  int64_t capacity;
  int key_chunks, value_chunks;
};

// A row's number in the source and in the target; the latter is negative for a row that is left out.
struct RowPair {
  int64_t from, to;
};

// A warp copies kRowsOfWarp rows, number i as pair(i) says.
template <class Pairs>
__device__ inline void copy_rows(const RowTarget& target, const uint4* key, int64_t key_stride, const uint4* value, int64_t value_stride,
                                 const Pairs& pair) {
  const int chunks = target.key_chunks + target.value_chunks;
  for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) {
    const bool is_key = chunk < target.key_chunks;
    const int at = is_key ? chunk : chunk - target.key_chunks;
    uint4 held[kRowsOfWarp];
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const RowPair rows = pair(i);
      if (rows.to >= 0) held[i] = is_key ? key[rows.from * key_stride + at] : value[rows.from * value_stride + at];
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int64_t row = pair(i).to;
      if (row < 0) continue;
      if (is_key) {
        target.key[row * target.key_chunks + at] = held[i];
      } else {
        target.value[row * target.value_chunks + at] = held[i];
      }
    }
  }
}

// How many of real[0 .. count) are set; every thread of the block must ask.
__device__ inline int count_real(const uint8_t* real, int64_t stride, int count) {
  if (real == nullptr) return count;
  int total = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + threadIdx.x;
    total += __syncthreads_count(i < count && real[i * stride]);
  }
  return total;
}

// The new rows' validity: bool [B, n], or none.
struct Validity {
  const uint8_t* real;
  int64_t batch_stride, row_stride;
  int heads, rows;

  __device__ const uint8_t* of(int sequence) const { return real ? real + sequence / heads * batch_stride : nullptr; }
};

// Appends kRowsOfBlock of a sequence's new rows a block. `last`: there is one block a sequence, which raises the length.
__global__ void __launch_bounds__(kThreads) append_rows(const RowTarget target, const RowSource source, int32_t* lengths,
                                                        const Validity validity, int blocks, int first_position, bool last) {
  __shared__ int offsets[kRowsOfBlock];
  const int sequence = blockIdx.x / blocks, first = blockIdx.x % blocks * kRowsOfBlock;
  const int batch = sequence / validity.heads, head = sequence % validity.heads;
  const int count = min(kRowsOfBlock, validity.rows - first);
  const uint8_t* real = validity.of(sequence);
  const int length = lengths[sequence];
  const int64_t end = int64_t(target.starts[sequence]) + length;
  const int before = count_real(real, validity.row_stride, first);
  // Where each row goes, counted from the sequence's end; -1 for padding.
  if (threadIdx.x < count) {
    int offset = before;
    if (real == nullptr) {
      offset += threadIdx.x;
    } else {
      for (int i = 0; i < threadIdx.x; ++i) offset += real[(first + i) * validity.row_stride] != 0;
      if (!real[(first + threadIdx.x) * validity.row_stride]) offset = -1;
    }
    // A caller that breaks its promise of room must not reach other memory.
    if (offset >= 0 && end + offset >= target.capacity) offset = -1;
    offsets[threadIdx.x] = offset;
    if (offset >= 0) target.position[end + offset] = first_position + first + threadIdx.x;
  }
  __syncthreads();
  const uint4* key = source.key + batch * source.key_strides.batch + head * source.key_strides.head;
  const uint4* value = source.value + batch * source.value_strides.batch + head * source.value_strides.head;
  for (int i = threadIdx.x / 32 * kRowsOfWarp; i < count; i += kWarps * kRowsOfWarp) {
    copy_rows(target, key, source.key_strides.row, value, source.value_strides.row, [&](int j) -> RowPair {
      if (i + j >= count || offsets[i + j] < 0) return {0, -1};
      return {first + i + j, end + offsets[i + j]};
    });
  }
  if (last) {
    const int added = count_real(real, validity.row_stride, validity.rows);
    if (threadIdx.x == 0) lengths[sequence] = length + added;
  }
}

// Raises a sequence's length once its rows are in place.
__global__ void __launch_bounds__(kThreads) raise_lengths(int32_t* lengths, const Validity validity) {
  const int added = count_real(validity.of(blockIdx.x), validity.row_stride, validity.rows);
  if (threadIdx.x == 0) lengths[blockIdx.x] += added;
}

// Gathers rows of [B, Hkv, N, size] tensors; `blocks` blocks share a sequence.
__global__ void __launch_bounds__(kThreads) gather_rows(const RowTarget target, const RowSource source, const int32_t* lengths,
                                                        const int32_t* offsets, const int32_t* positions, int heads, int blocks) {
  const int sequence = blockIdx.x / blocks, batch = sequence / heads, head = sequence % heads;
  const int length = lengths[sequence];
  const int64_t start = target.starts[sequence];
  const int32_t* taken = positions + offsets[sequence];
  const uint4* key = source.key + batch * source.key_strides.batch + head * source.key_strides.head;
  const uint4* value = source.value + batch * source.value_strides.batch + head * source.value_strides.head;
  const int64_t step = int64_t(blocks) * kWarps * kRowsOfWarp;
  for (int64_t i = int64_t(blockIdx.x % blocks * kWarps + threadIdx.x / 32) * kRowsOfWarp; i < length; i += step) {
    copy_rows(target, key, source.key_strides.row, value, source.value_strides.row, [&](int j) -> RowPair {
      if (i + j >= length) return {0, -1};
      return {taken[i + j], start + i + j};
    });
    const int64_t row = i + threadIdx.x % 32;
    if (threadIdx.x % 32 < kRowsOfWarp && row < length) target.position[start + row] = taken[row];
  }
}

// Copies sequences from one store to another.
__global__ void __launch_bounds__(kThreads) move_sequences(const RowTarget target, const uint4* key, const uint4* value,
                                                           const int32_t* position, const int32_t* from_starts, const int32_t* lengths,
                                                           int blocks) {
  const int sequence = blockIdx.x / blocks, length = lengths[sequence];
  const int64_t start = target.starts[sequence], from = from_starts[sequence];
  const int64_t step = int64_t(blocks) * kWarps * kRowsOfWarp;
  for (int64_t i = int64_t(blockIdx.x % blocks * kWarps + threadIdx.x / 32) * kRowsOfWarp; i < length; i += step) {
    copy_rows(target, key, target.key_chunks, value, target.value_chunks, [&](int j) -> RowPair {
      if (i + j >= length) return {0, -1};
      return {from + i + j, start + i + j};
    });
    const int64_t row = i + threadIdx.x % 32;
    if (threadIdx.x % 32 < kRowsOfWarp && row < length) target.position[start + row] = position[from + row];
  }
}

static int64_t chunk_elements(const Tensor& tensor) { return 16 / int64_t(tensor.element_size()); }

static RowTarget target_of(const Store& store, const Tensor& key, const Tensor& value, const Tensor& position, const Tensor& starts) {
  check_ints(position, store.rows, "position_buffer");
  check_aligned(key, "key_buffer");
  check_aligned(value, "value_buffer");
  const int64_t each = chunk_elements(key);
  return {data<uint4>(key), data<uint4>(value), data<int32_t>(position), data<int32_t>(starts), store.rows, int(store.size / each),
          int(store.value_size / each)};
}

static Strides chunk_strides(const Tensor& tensor) {
  const int64_t each = chunk_elements(tensor);
  return {tensor.stride(0) / each, tensor.stride(1) / each, tensor.stride(2) / each};
}

static RowSource source_of(const Tensor& key, const Tensor& value) {
  return {data<uint4>(key), data<uint4>(value), chunk_strides(key), chunk_strides(value)};
}

// Blocks that share a sequence of about so many rows.
static int blocks_for(int64_t rows) {
  constexpr int64_t kMost = 256;
  return int(std::clamp<int64_t>((rows + kRowsOfBlock - 1) / kRowsOfBlock, 1, kMost));
}

void append(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor key, Tensor value, int64_t first_position,
            std::optional<Tensor> valid) {
  const Place place(key_buffer);
  place.check({&value_buffer, &position_buffer, &starts, &lengths, &key, &value});
  place.check(valid);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  check_new(store, key_buffer, key, value);
  const RowTarget target = target_of(store, key_buffer, value_buffer, position_buffer, starts);
  const int rows = narrow(key.size(2));
  Validity validity{nullptr, 0, 0, narrow(key.size(1)), rows};
  if (valid) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->dim() == 2 && valid->size(0) == key.size(0) &&
                        valid->size(1) == rows,
                    "valid must be a bool [B, n] tensor");
    validity.real = data<uint8_t>(*valid);
    validity.batch_stride = valid->stride(0);
    validity.row_stride = valid->stride(1);
  }
  if (rows == 0 || store.sequences == 0) return;
  key = vector_rows(key);
  value = vector_rows(value);
  const int blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  launch<append_rows>(place.device(), place.stream(), store.sequences * blocks, kThreads, 0, target, source_of(key, value),
                      data<int32_t>(lengths), validity, blocks, narrow(first_position), blocks == 1);
  if (blocks > 1) launch<raise_lengths>(place.device(), place.stream(), store.sequences, kThreads, 0, data<int32_t>(lengths), validity);
}

static void compact(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                    std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor offsets, Tensor key, Tensor value,
                    Tensor positions) {
  const Place place(key_buffer);
  place.check({&value_buffer, &position_buffer, &starts, &lengths, &offsets, &key, &value, &positions});
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  check_new(store, key_buffer, key, value);
  check_ints(offsets, store.sequences, "offsets");
  check_ints(positions, -1, "positions");
  const RowTarget target = target_of(store, key_buffer, value_buffer, position_buffer, starts);
  if (positions.numel() == 0) return;
  key = vector_rows(key);
  value = vector_rows(value);
  const int blocks = blocks_for(positions.numel() / store.sequences);
  launch<gather_rows>(place.device(), place.stream(), store.sequences * blocks, kThreads, 0, target, source_of(key, value),
                      data<int32_t>(lengths), data<int32_t>(offsets), data<int32_t>(positions), narrow(key.size(1)), blocks);
}

static void move_rows(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                      std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor from_key, Tensor from_value,
                      Tensor from_position, Tensor from_starts, std::optional<Tensor> from_key_scale,
                      std::optional<Tensor> from_value_scale, int64_t max_length) {
  const Place place(key_buffer);
  place.check({&value_buffer, &position_buffer, &starts, &lengths, &from_key, &from_value, &from_position, &from_starts});
  refuse_codes(key_scale);
  const Store to(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  const Store from(from_key, from_value, from_starts, lengths, std::nullopt, std::nullopt);
  check_ints(from_position, from.rows, "from_position");
  STD_TORCH_CHECK(to.size == from.size && to.value_size == from.value_size && key_buffer.scalar_type() == from_key.scalar_type(),
                  "both stores must have one dtype and one head size");
  const RowTarget target = target_of(to, key_buffer, value_buffer, position_buffer, starts);
  check_aligned(from_key, "from_key");
  check_aligned(from_value, "from_value");
  const int blocks = blocks_for(max_length);
  launch<move_sequences>(place.device(), place.stream(), to.sequences * blocks, kThreads, 0, target, data<uint4>(from_key),
                         data<uint4>(from_value), data<int32_t>(from_position), data<int32_t>(from_starts), data<int32_t>(lengths), blocks);
}

}  // namespace mixkv::cuda

STABLE_TORCH_LIBRARY_IMPL(mixkv, CUDA, m) {
  m.impl("append", TORCH_BOX(&mixkv::cuda::append));
  m.impl("compact", TORCH_BOX(&mixkv::cuda::compact));
  m.impl("move_rows", TORCH_BOX(&mixkv::cuda::move_rows));
}
