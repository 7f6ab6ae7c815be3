// Attention over flat storage: attend, append_attend, attend_extend, attend_chunks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>

#include "place.h"
#include "rows.h"

namespace mixkv::cuda {

// Rows that a part of a sequence has at least, and at most where there are enough parts for every multiprocessor: then blocks are
// many and alike, whatever the lengths.
constexpr int64_t kLeastChunk = 128;
constexpr int64_t kMostChunk = 512;

template <class T>
static void run_as(Attention& a, int64_t most_rows, const Place& place) {
  const Shape shape = attend_shape<T>(a, place.device());
  a.ring_stages = shape.ring_stages;
  a.splits = 1;
  int64_t chunk = most_rows;
  const int64_t blocks = a.sequences * a.tiles, room = int64_t(place.device().multiprocessors) * shape.blocks_per_multiprocessor;
  // Decoding fills the machine several times over; blocks of queries do so by their number.
  if (most_rows > kWholeRows && (a.queries == 1 || blocks < room)) {
    const int64_t wanted = (room + blocks - 1) / blocks;
    chunk = std::max((most_rows + wanted - 1) / wanted, kLeastChunk);
    if (a.queries == 1) chunk = std::min(chunk, kMostChunk);
    chunk = std::max(chunk, (most_rows + kMostSplits - 1) / kMostSplits);
    chunk = (chunk + shape.rows_per_stage - 1) / shape.rows_per_stage * shape.rows_per_stage;
    a.splits = narrow((most_rows + chunk - 1) / chunk);
  }
  a.chunk = narrow(chunk);
  std::optional<Tensor> parts;
  if (a.splits > 1) {
    const int64_t count = a.sequences * a.groups * a.queries * a.splits;
    parts = place.empty({count * (2 + a.value_size)}, ScalarType::Float);
    a.partial_state = data<float2>(*parts);
    a.partial = data<float>(*parts) + 2 * count;
  }
  launch_attend<T>(a, shape, place.device(), place.stream());
}

// Attention of queries over stored rows and new ones; most_rows bounds their number.
static Tensor run(Attention& a, const Tensor& query, const Store& store, const Heads& heads, const Tensor& key_buffer,
                  const Tensor& value_buffer, const Tensor& starts, const Tensor& lengths, int64_t most_rows, double scaling,
                  double softcap, const std::optional<Tensor>& sinks, const Place& place) {
  place.check({&key_buffer, &value_buffer, &starts, &lengths});
  place.check(sinks);
  check_aligned(key_buffer, "key_buffer");
  check_aligned(value_buffer, "value_buffer");
  Tensor out = place.empty({heads.batch, heads.rows, heads.query_heads, store.value_size}, query.scalar_type());
  const Tensor dense = vector_rows(query);
  a.query = data<void>(dense);
  a.query_strides = strides_of(dense);
  a.key = data<void>(key_buffer);
  a.value = data<void>(value_buffer);
  a.starts = data<int32_t>(starts);
  a.lengths = data<int32_t>(lengths);
  a.capacity = store.rows;
  a.sinks = data<float>(sinks);
  a.out = data<void>(out);
  a.sequences = store.sequences;
  a.heads = narrow(heads.heads);
  a.groups = narrow(heads.groups);
  a.queries = narrow(heads.rows);
  a.size = narrow(store.size);
  a.value_size = narrow(store.value_size);
  a.scaling = static_cast<float>(scaling);
  a.softcap = static_cast<float>(softcap);
  const int64_t query_rows = heads.groups * heads.rows;
  a.tiles = narrow((query_rows + 15) / 16);
  if (query_rows == 0) return out;
  most_rows = narrow(std::max<int64_t>(most_rows, 1));
  switch (key_buffer.scalar_type()) {
    case ScalarType::Float: run_as<float>(a, most_rows, place); break;
    case ScalarType::Half: run_as<__half>(a, most_rows, place); break;
    default: run_as<__nv_bfloat16>(a, most_rows, place);
  }
  return out;
}

static Tensor attend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths,
                     std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, std::optional<Tensor> packed_key,
                     std::optional<Tensor> packed_value, std::optional<Tensor> packed_starts,
                     std::optional<Tensor> packed_lengths, std::optional<Tensor> packed_key_scale,
                     std::optional<Tensor> packed_value_scale, int64_t max_length, double scaling, double softcap,
                     std::optional<Tensor> sinks) {
  const Place place(query);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1, "attend takes one query position, not ", heads.rows);
  Attention a{};
  return run(a, query, store, heads, key_buffer, value_buffer, starts, lengths, max_length, scaling, softcap, sinks, place);
}

static Tensor attend_chunks(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths,
                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor chunk_key,
                            Tensor chunk_value, Tensor blocks, Tensor block_rows, int64_t chunk, int64_t max_length,
                            double scaling, double softcap, std::optional<Tensor> sinks) {
  const Place place(query);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1, "attend_chunks takes one query position, not ", heads.rows);
  const Chosen chosen(store, key_buffer, chunk_key, chunk_value, blocks, block_rows, chunk);
  place.check({&chunk_key, &chunk_value, &blocks, &block_rows});
  check_aligned(chunk_key, "chunk_key");
  check_aligned(chunk_value, "chunk_value");
  Attention a{};
  a.chunk_key = data<void>(chunk_key);
  a.chunk_value = data<void>(chunk_value);
  a.blocks = data<int32_t>(blocks);
  a.block_rows = data<int32_t>(block_rows);
  a.chunk_capacity = chosen.rows;
  a.slots = narrow(chosen.most);
  a.chunk_size = narrow(chunk);
  const int64_t most_rows = max_length + chosen.most * chunk;
  return run(a, query, store, heads, key_buffer, value_buffer, starts, lengths, most_rows, scaling, softcap, sinks, place);
}

static void take_new(Attention& a, const Tensor& key, const Tensor& value) {
  a.new_key = data<void>(key);
  a.new_value = data<void>(value);
  a.new_key_strides = strides_of(key);
  a.new_value_strides = strides_of(value);
  a.new_rows = narrow(key.size(2));
}

static Tensor append_attend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts,
                            Tensor lengths, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale,
                            std::optional<Tensor> packed_key, std::optional<Tensor> packed_value,
                            std::optional<Tensor> packed_starts, std::optional<Tensor> packed_lengths,
                            std::optional<Tensor> packed_key_scale, std::optional<Tensor> packed_value_scale, Tensor key,
                            Tensor value, int64_t first_position, bool, int64_t max_length, double scaling, double softcap,
                            std::optional<Tensor> sinks) {
  const Place place(query);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  check_new(store, key_buffer, key, value);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1, "append_attend takes one query position, not ", heads.rows);
  STD_TORCH_CHECK(key.size(0) == heads.batch, "query and new rows must agree in batch");
  check_ints(position_buffer, store.rows, "position_buffer");
  place.check({&position_buffer, &key, &value});
  if (heads.groups > 16) {
    // Several blocks read a sequence's length: it is raised in a launch of its own.
    append(key_buffer, value_buffer, position_buffer, starts, lengths, key_scale, value_scale, key, value, first_position, std::nullopt);
    return attend(query, key_buffer, value_buffer, starts, lengths, key_scale, value_scale, packed_key, packed_value, packed_starts, packed_lengths, packed_key_scale, packed_value_scale,
                  max_length, scaling, softcap, sinks);
  }
  key = vector_rows(key);
  value = vector_rows(value);
  Attention a{};
  take_new(a, key, value);
  a.store = true;
  a.position = data<int32_t>(position_buffer);
  a.first_position = narrow(first_position);
  return run(a, query, store, heads, key_buffer, value_buffer, starts, lengths, max_length, scaling, softcap, sinks, place);
}

static __global__ void raise_new_lengths(const Attention a) {
  const int64_t sequence = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (sequence < a.sequences) a.lengths[sequence] = raised_length(a, int(sequence), a.lengths[sequence]);
}

static Tensor step(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor ends, Tensor evicted, Tensor key, Tensor value,
                   int64_t max_length, double scaling, double softcap, std::optional<Tensor> sinks) {
  const Place place(query);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  check_new(store, key_buffer, key, value);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1 && key.size(2) == 1, "step takes one query position and one new row");
  STD_TORCH_CHECK(key.size(0) == heads.batch, "query and new rows must agree in batch");
  check_ints(position_buffer, store.rows, "position_buffer");
  check_ints(ends, store.sequences, "ends");
  check_ints(evicted, store.sequences, "evicted");
  place.check({&position_buffer, &ends, &evicted, &key, &value});
  key = vector_rows(key);
  value = vector_rows(value);
  Attention a{};
  take_new(a, key, value);
  a.store = true;
  a.position = data<int32_t>(position_buffer);
  a.evicted = data<int32_t>(evicted);
  a.ends = data<int32_t>(ends);
  Tensor out =
      run(a, query, store, heads, key_buffer, value_buffer, starts, lengths, max_length, scaling, softcap, sinks, place);
  // Several blocks have read a sequence's length, and none has raised it.
  if (a.tiles > 1 && a.splits == 1) {
    constexpr int kThreads = 128;
    launch<raise_new_lengths>(place.device(), place.stream(), (a.sequences + kThreads - 1) / kThreads, kThreads, 0, a);
  }
  return out;
}

static Tensor attend_extend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths,
                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, std::optional<Tensor> packed_key,
                            std::optional<Tensor> packed_value, std::optional<Tensor> packed_starts,
                            std::optional<Tensor> packed_lengths, std::optional<Tensor> packed_key_scale,
                            std::optional<Tensor> packed_value_scale, Tensor key, Tensor value, std::optional<Tensor> mask,
                            int64_t max_length, double scaling, double softcap, std::optional<Tensor> sinks) {
  const Place place(query);
  refuse_codes(key_scale);
  const Store store(key_buffer, value_buffer, starts, lengths, std::nullopt, std::nullopt);
  check_new(store, key_buffer, key, value);
  const Heads heads(store, query, key_buffer, sinks);
  const int64_t rows = heads.rows;
  STD_TORCH_CHECK(key.size(0) == heads.batch && key.size(2) == rows, "query and new rows must agree in batch and number");
  place.check({&key, &value});
  place.check(mask);
  key = vector_rows(key);
  value = vector_rows(value);
  Attention a{};
  take_new(a, key, value);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 && mask->size(2) == rows && mask->size(3) == rows &&
                        mask->size(1) == 1 && (mask->size(0) == heads.batch || mask->size(0) == 1),
                    "mask must be a bool [B or 1, 1, n, n] tensor");
    a.mask = data<uint8_t>(*mask);
    a.mask_strides = {mask->size(0) > 1 ? mask->stride(0) : 0, mask->stride(2), mask->stride(3)};
  } else {
    a.causal = true;
  }
  return run(a, query, store, heads, key_buffer, value_buffer, starts, lengths, max_length + rows, scaling, softcap, sinks, place);
}

}  // namespace mixkv::cuda

STABLE_TORCH_LIBRARY_IMPL(mixkv, CUDA, m) {
  m.impl("attend", TORCH_BOX(&mixkv::cuda::attend));
  m.impl("append_attend", TORCH_BOX(&mixkv::cuda::append_attend));
  m.impl("step", TORCH_BOX(&mixkv::cuda::step));
  m.impl("attend_extend", TORCH_BOX(&mixkv::cuda::attend_extend));
  m.impl("attend_chunks", TORCH_BOX(&mixkv::cuda::attend_chunks));
}
