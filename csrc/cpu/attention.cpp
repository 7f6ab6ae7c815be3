// Attention over flat storage: attend, append_attend, attend_extend, attend_chunks, and chunk_scores. Divides the work among torch's threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention.h"
#include "rows.h"
#include "runs.h"

namespace mixkv::cpu {

// Multiplications that one thread does before another is worth its start.
constexpr int64_t kGrain = 1 << 17;
// Query rows that share one pass over the stored rows in `attend_extend`.
constexpr int64_t kExtendQueries = 32;

static int64_t state_floats(int64_t count, int64_t value_size) { return count * (2 + value_size); }

static State fresh_state(float* memory, int64_t count, int64_t value_size) {
  State state{memory, memory + count, memory + 2 * count};
  std::fill_n(state.maximum, count, -std::numeric_limits<float>::infinity());
  std::fill_n(state.mass, count * (1 + value_size), 0.0f);
  return state;
}

// Takes what another part of the same sequence has seen into `into`.
static void merge(const State& into, const State& other, int64_t count, int64_t value_size) {
  for (int64_t i = 0; i < count; ++i) {
    const float highest = std::max(into.maximum[i], other.maximum[i]);
    if (highest == -std::numeric_limits<float>::infinity()) continue;
    const float mine = std::exp(into.maximum[i] - highest), theirs = std::exp(other.maximum[i] - highest);
    into.mass[i] = into.mass[i] * mine + other.mass[i] * theirs;
    for (int64_t d = 0; d < value_size; ++d)
      into.sum[i * value_size + d] = into.sum[i * value_size + d] * mine + other.sum[i * value_size + d] * theirs;
    into.maximum[i] = highest;
  }
}

static Tensor attend_runs(Tensor query, const Store& store, const Heads& heads, const Runs& runs, double scaling, double softcap,
                          const std::optional<Tensor>& sinks) {
  query = row_dense(query);
  Tensor out = torch::stable::new_empty(query, {heads.batch, 1, heads.query_heads, store.value_size});

  const Kernels& set = kernels();
  const ElementKernels& kernel = set.of[element_of(query)];
  const int64_t groups = heads.groups, value_size = store.value_size, bytes = query.element_size();
  const int64_t value_bytes = value_size * bytes;
  const int64_t query_batch = query.stride(0) * bytes, query_head = query.stride(1) * bytes;
  const char* queries = data<char>(query);
  char* outs = data<char>(out);
  const float* sink = sinks ? data<float>(*sinks) : nullptr;

  auto finish = [&](int64_t s, const State& state, std::vector<void*>& targets) {
    for (int64_t g = 0; g < groups; ++g) targets[g] = outs + (s * groups + g) * value_bytes;
    kernel.finish(state, int(groups), int(value_size), sink ? sink + s % heads.heads * groups : nullptr, targets.data());
  };

  // All rows in one line, cut into equal parts: a sequence that a cut meets is finished from its pieces.
  const int64_t multiplications = runs.total * (store.size + value_size) * groups;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), multiplications / kGrain));
  struct Piece {
    int64_t sequence = -1;
    State state;
  };
  const int64_t piece_floats = state_floats(groups, value_size);
  std::vector<Piece> pieces(2 * parts);
  const auto piece_memory = scratch(parts > 1 ? 2 * parts * piece_floats : 0);

  auto work = [&](int64_t begin, int64_t end) {
    const auto memory = scratch(piece_floats + set.attend_scratch(int(groups), int(store.size)));
    std::vector<const void*> rows(groups);
    std::vector<void*> targets(groups);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t low = runs.total * part / parts, high = runs.total * (part + 1) / parts;
      int64_t before = 0, used = 0;
      for (int64_t s = 0; s < store.sequences && before < high; before += runs.rows[s], ++s) {
        const int64_t length = runs.rows[s];
        const int64_t from = std::max<int64_t>(low - before, 0), to = std::min(high - before, length);
        if (from >= to) continue;
        const bool whole = from == 0 && to == length;
        float* at = memory.get();
        if (!whole) at = piece_memory.get() + (2 * part + used) * piece_floats;
        const State state = fresh_state(at, groups, value_size);
        const char* first = queries + s / heads.heads * query_batch + s % heads.heads * groups * query_head;
        for (int64_t g = 0; g < groups; ++g) rows[g] = first + g * query_head;
        int64_t passed = 0;
        for (int64_t i = runs.first[s]; i < runs.first[s + 1] && passed < to; passed += runs.all[i].rows, ++i) {
          const Run& run = runs.all[i];
          const int64_t skip = std::max<int64_t>(from - passed, 0), stop = std::min(to - passed, run.rows);
          if (skip >= stop) continue;
          take(kernel, {rows.data(), int(groups), int(store.size), int(value_size), float(scaling), float(softcap)},
               part_of(run, skip, stop, bytes), state, memory.get() + piece_floats);
        }
        if (whole) {
          finish(s, state, targets);
        } else {
          pieces[2 * part + used++] = {s, state};
        }
      }
    }
  };
  if (parts == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, work);
  }

  std::vector<void*> targets(groups);
  for (size_t i = 0; i < pieces.size();) {
    const int64_t s = pieces[i].sequence;
    const State state = pieces[i].state;
    for (++i; i < pieces.size() && (pieces[i].sequence == s || pieces[i].sequence < 0); ++i)
      if (s >= 0 && pieces[i].sequence == s) merge(state, pieces[i].state, groups, value_size);
    if (s >= 0) finish(s, state, targets);
  }
  for (int64_t s = 0; s < store.sequences; ++s)
    if (runs.rows[s] == 0) std::memset(outs + s * groups * value_bytes, 0, groups * value_bytes);
  return out;
}

Tensor attend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths, std::optional<Tensor> key_scale,
              std::optional<Tensor> value_scale, std::optional<Tensor> packed_key, std::optional<Tensor> packed_value,
              std::optional<Tensor> packed_starts, std::optional<Tensor> packed_lengths, std::optional<Tensor> packed_key_scale,
              std::optional<Tensor> packed_value_scale, int64_t, double scaling, double softcap, std::optional<Tensor> sinks) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1, "attend takes one query position, not ", heads.rows);
  const Extents extents(store, starts, lengths);
  const Buffers buffers(key_buffer, value_buffer, key_scale, value_scale);
  const PackedRows packed(store, packed_key, packed_value, packed_starts, packed_lengths, packed_key_scale, packed_value_scale);
  Runs runs(store.sequences);
  runs.all.reserve(2 * store.sequences);
  for (int64_t s = 0; s < store.sequences; ++s) {
    runs.begin();
    runs.add(packed.run(s));
    runs.add(buffers.run(extents.starts[s], extents.lengths[s]));
  }
  runs.end();
  return attend_runs(query, store, heads, runs, scaling, softcap, sinks);
}

static Tensor attend_chunks(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths,
                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor chunk_key, Tensor chunk_value,
                            Tensor blocks, Tensor block_rows, int64_t chunk, int64_t, double scaling, double softcap,
                            std::optional<Tensor> sinks) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(heads.rows == 1, "attend_chunks takes one query position, not ", heads.rows);
  const Extents extents(store, starts, lengths);
  const Chosen chosen(store, key_buffer, chunk_key, chunk_value, blocks, block_rows, chunk);
  const int32_t* first = data<int32_t>(blocks);
  const int32_t* rows = data<int32_t>(block_rows);
  const Buffers buffers(key_buffer, value_buffer, key_scale, value_scale), chunks(chunk_key, chunk_value, std::nullopt, std::nullopt);
  Runs runs(store.sequences);
  runs.all.reserve(store.sequences * (1 + chosen.most));
  for (int64_t s = 0; s < store.sequences; ++s) {
    runs.begin();
    runs.add(buffers.run(extents.starts[s], extents.lengths[s]));
    for (int64_t i = s * chosen.most; i < (s + 1) * chosen.most; ++i) {
      if (rows[i] == 0) continue;
      STD_TORCH_CHECK(first[i] >= 0 && rows[i] > 0 && rows[i] <= chunk && first[i] + int64_t(rows[i]) <= chosen.rows, "a chunk of sequence ",
                      s, " (first row ", first[i], ", rows ", rows[i], ") reaches beyond the buffer of ", chosen.rows, " rows");
      runs.add(chunks.run(first[i], rows[i]));
    }
  }
  runs.end();
  return attend_runs(query, store, heads, runs, scaling, softcap, sinks);
}

static Tensor chunk_scores(Tensor query, Tensor codes, Tensor grid, Tensor starts, Tensor counts, int64_t longest) {
  const BoundsShape shape(query, codes, grid, starts, counts);
  query = torch::stable::contiguous(query);
  Tensor out = torch::stable::new_empty(query, {shape.sequences, longest}, ScalarType::Float);
  const Kernels& set = kernels();
  const ElementKernels& kernel = set.of[element_of(query)];
  const int64_t row_bytes = shape.size * query.element_size();
  const int32_t* first = data<int32_t>(starts);
  const int32_t* count = data<int32_t>(counts);
  int64_t most = 1;
  for (int64_t s = 0; s < shape.sequences; ++s) {
    STD_TORCH_CHECK(first[s] >= 0 && count[s] >= 0 && count[s] <= longest && first[s] + int64_t(count[s]) <= shape.chunks, "sequence ", s,
                    " (first chunk ", first[s], ", chunks ", count[s], ") reaches beyond ", shape.chunks, " chunks or the longest, ", longest);
    most = std::max<int64_t>(most, count[s]);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / (most * shape.size * 2 * shape.groups));
  torch::stable::parallel_for(0, shape.sequences, grain, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(set.bounds_scratch(int(shape.size)));
    std::vector<const void*> rows(shape.groups);
    for (int64_t s = begin; s < end; ++s) {
      float* to = data<float>(out) + s * longest;
      std::fill(to + count[s], to + longest, -std::numeric_limits<float>::infinity());
      if (count[s] == 0) continue;
      for (int64_t g = 0; g < shape.groups; ++g) rows[g] = data<char>(query) + (s * shape.groups + g) * row_bytes;
      kernel.bounds({rows.data(), int(shape.groups), int(shape.size), data<uint8_t>(codes) + first[s] * shape.size,
                     data<float>(grid) + s * 2 * shape.size, count[s]},
                    to, memory.get());
    }
  });
  return out;
}

// Each row rotated, in float32.
static Tensor rotated(const Tensor& rows) {
  const Tensor from = torch::stable::contiguous(rows);
  Tensor to = torch::stable::new_empty(from, {from.size(0), from.size(1), from.size(2), from.size(3)}, ScalarType::Float);
  const ElementKernels& kernel = kernels().of[element_of(from)];
  const int64_t size = from.size(3), bytes = size * int64_t(from.element_size());
  for (int64_t row = 0; row < from.numel() / size; ++row) kernel.rotate(data<char>(from) + row * bytes, int(size), data<float>(to) + row * size);
  return to;
}

// The inverse for rows of float32, in the dtype of `like`.
static Tensor rotated_back(const Tensor& rows, const Tensor& like) {
  Tensor to = torch::stable::new_empty(like, {rows.size(0), rows.size(1), rows.size(2), rows.size(3)}, like.scalar_type());
  const ElementKernels& kernel = kernels().of[element_of(like)];
  const int64_t size = rows.size(3), bytes = size * int64_t(to.element_size());
  for (int64_t row = 0; row < rows.numel() / size; ++row)
    kernel.rotate_back(data<float>(rows) + row * size, int(size), data<char>(to) + row * bytes);
  return to;
}

static Tensor append_attend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts,
                            Tensor lengths, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale,
                            std::optional<Tensor> packed_key, std::optional<Tensor> packed_value,
                            std::optional<Tensor> packed_starts, std::optional<Tensor> packed_lengths,
                            std::optional<Tensor> packed_key_scale, std::optional<Tensor> packed_value_scale, Tensor key,
                            Tensor value, int64_t first_position, bool rotate, int64_t max_length, double scaling, double softcap,
                            std::optional<Tensor> sinks) {
  if (rotate) {
    const Tensor turned = rotated(query);
    const Tensor output = append_attend(turned, key_buffer, value_buffer, position_buffer, starts, lengths, key_scale, value_scale, packed_key,
                                        packed_value, packed_starts, packed_lengths, packed_key_scale, packed_value_scale, rotated(key),
                                        rotated(value), first_position, false, max_length, scaling, softcap, sinks);
    return rotated_back(output, query);
  }
  append(key_buffer, value_buffer, position_buffer, starts, lengths, key_scale, value_scale, key, value, first_position, std::nullopt);
  return attend(query, key_buffer, value_buffer, starts, lengths, key_scale, value_scale, packed_key, packed_value, packed_starts,
                packed_lengths, packed_key_scale, packed_value_scale, max_length, scaling, softcap, sinks);
}

static Tensor attend_extend(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths,
                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, std::optional<Tensor> packed_key,
                            std::optional<Tensor> packed_value, std::optional<Tensor> packed_starts,
                            std::optional<Tensor> packed_lengths, std::optional<Tensor> packed_key_scale,
                            std::optional<Tensor> packed_value_scale, Tensor key, Tensor value, std::optional<Tensor> mask, int64_t,
                            double scaling, double softcap, std::optional<Tensor> sinks) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  check_new(store, key_buffer, key, value);
  const Heads heads(store, query, key_buffer, sinks);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "query and new rows must have one dtype");
  const int64_t rows = heads.rows;
  STD_TORCH_CHECK(key.size(0) == heads.batch && key.size(2) == rows, "query and new rows must agree in batch and number");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 && mask->size(2) == rows && mask->size(3) == rows &&
                        mask->size(1) == 1 && (mask->size(0) == heads.batch || mask->size(0) == 1),
                    "mask must be a bool [B or 1, 1, n, n] tensor");
  }
  const Extents extents(store, starts, lengths);
  query = row_dense(query);
  key = row_dense(key);
  value = row_dense(value);
  Tensor out = torch::stable::new_empty(query, {heads.batch, rows, heads.query_heads, store.value_size});
  if (rows == 0) return out;

  const Kernels& set = kernels();
  const ElementKernels& kernel = set.of[element_of(query)];
  const Buffers buffers(key_buffer, value_buffer, key_scale, value_scale);
  const PackedRows packed(store, packed_key, packed_value, packed_starts, packed_lengths, packed_key_scale, packed_value_scale);
  const int64_t groups = heads.groups, value_size = store.value_size, bytes = query.element_size();
  const int64_t block = std::clamp<int64_t>(kExtendQueries / groups, 1, rows), blocks = (rows + block - 1) / block;
  const int64_t most = block * groups;
  const int64_t query_strides[] = {query.stride(0) * bytes, query.stride(1) * bytes, query.stride(2) * bytes};
  const int64_t key_strides[] = {key.stride(0) * bytes, key.stride(1) * bytes};
  const int64_t value_strides[] = {value.stride(0) * bytes, value.stride(1) * bytes};
  const int64_t key_row = key.stride(2), value_row = value.stride(2);
  const int64_t mask_batch = mask && mask->size(0) > 1 ? mask->stride(0) : 0, mask_query = mask ? mask->stride(2) : 0;
  const int64_t mask_row = mask ? mask->stride(3) : 0;
  const uint8_t* seen = mask ? data<uint8_t>(*mask) : nullptr;
  const char* queries = data<char>(query);
  const char* new_keys = data<char>(key);
  const char* new_values = data<char>(value);
  char* outs = data<char>(out);
  const float* sink = sinks ? data<float>(*sinks) : nullptr;

  torch::stable::parallel_for(0, store.sequences * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(state_floats(most, value_size) + most + set.attend_scratch(int(most), int(store.size)));
    float* row_sinks = memory.get() + state_floats(most, value_size);
    std::vector<const void*> query_rows(most);
    std::vector<void*> targets(most);
    std::vector<int64_t> limits(most);
    std::vector<const uint8_t*> masks(most);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / blocks, b = s / heads.heads, h = s % heads.heads;
      const int64_t first = item % blocks * block, last = std::min(first + block, rows);
      int64_t count = 0;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t i = first; i < last; ++i, ++count) {
          const int64_t head = h * groups + g;
          query_rows[count] = queries + b * query_strides[0] + head * query_strides[1] + i * query_strides[2];
          targets[count] = outs + ((b * rows + i) * heads.query_heads + head) * value_size * bytes;
          limits[count] = i;
          masks[count] = seen ? seen + b * mask_batch + i * mask_query : nullptr;
          row_sinks[count] = sink ? sink[head] : 0.0f;
        }
      }
      const State state = fresh_state(memory.get(), count, value_size);
      const Queries block_queries{query_rows.data(), int(count), int(store.size), int(value_size), float(scaling), float(softcap)};
      float* free = row_sinks + most;
      take(kernel, block_queries, packed.run(s), state, free);
      take(kernel, block_queries, buffers.run(extents.starts[s], extents.lengths[s]), state, free);
      const Visible visible{seen ? nullptr : limits.data(), seen ? masks.data() : nullptr, mask_row};
      kernel.attend(block_queries,
                    {new_keys + b * key_strides[0] + h * key_strides[1], new_values + b * value_strides[0] + h * value_strides[1], key_row,
                     value_row, seen ? rows : last},
                    &visible, state, free);
      kernel.finish(state, int(count), int(value_size), sink ? row_sinks : nullptr, targets.data());
    }
  });
  return out;
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("attend", TORCH_BOX(&mixkv::cpu::attend));
  m.impl("append_attend", TORCH_BOX(&mixkv::cpu::append_attend));
  m.impl("attend_extend", TORCH_BOX(&mixkv::cpu::attend_extend));
  m.impl("attend_chunks", TORCH_BOX(&mixkv::cpu::attend_chunks));
  m.impl("chunk_scores", TORCH_BOX(&mixkv::cpu::chunk_scores));
}

extern "C" __attribute__((visibility("default"))) const char* mixkv_cpu_kernels() { return mixkv::kernels().name; }
