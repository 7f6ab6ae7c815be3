// The rows that sequences attend to, in runs that lie in one buffer each.
#pragma once

#include <optional>
#include <vector>

#include "store.h"

namespace mixkv::cpu {

// Rows `from` .. `to` of a run; `bytes`: of an element of rows without scales.
inline Run part_of(const Run& run, int64_t from, int64_t to, int64_t bytes) {
  if (run.key_scale != nullptr) bytes = 1;
  Run part = run;
  part.key = static_cast<const char*>(run.key) + from * run.key_stride * bytes;
  part.value = static_cast<const char*>(run.value) + from * run.value_stride * bytes;
  part.rows = to - from;
  if (run.key_scale != nullptr) {
    part.key_scale = run.key_scale + from;
    part.value_scale = run.value_scale + from;
  }
  return part;
}

// Takes a run that every query sees into the state.
inline void take(const ElementKernels& kernel, const Queries& queries, const Run& run, const State& state, float* scratch) {
  if (run.rows == 0) return;
  (run.key_scale != nullptr ? kernel.attend_codes : kernel.attend)(queries, run, nullptr, state, scratch);
}

// The rows that each sequence attends to, in runs: those of sequence s are all[first[s]] .. all[first[s + 1]].
struct Runs {
  std::vector<Run> all;
  std::vector<int64_t> first, rows;
  int64_t total = 0;

  explicit Runs(int64_t sequences) {
    first.reserve(sequences + 1);
    rows.reserve(sequences);
  }
  // The runs added from now on are the next sequence's.
  void begin() {
    first.push_back(int64_t(all.size()));
    rows.push_back(0);
  }
  void add(const Run& run) {
    if (run.rows == 0) return;
    all.push_back(run);
    rows.back() += run.rows;
    total += run.rows;
  }
  void end() { first.push_back(int64_t(all.size())); }
};

// A store's buffers, read in runs of rows.
struct Buffers {
  const char *key, *value;
  const uint16_t *key_scale, *value_scale;
  int64_t size, value_size, bytes;
  bool packed;

  Buffers(const Tensor& keys, const Tensor& values, const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales)
      : key(data<char>(keys)),
        value(data<char>(values)),
        key_scale(key_scales ? data<uint16_t>(*key_scales) : nullptr),
        value_scale(value_scales ? data<uint16_t>(*value_scales) : nullptr),
        size(keys.size(1)),
        value_size(values.size(1)),
        bytes(keys.element_size()),
        packed(keys.scalar_type() == ScalarType::Byte) {}

  Run run(int64_t row, int64_t rows) const {
    return {key + row * size * bytes, value + row * value_size * bytes, size, value_size, rows,
            key_scale ? key_scale + row : nullptr, value_scale ? value_scale + row : nullptr, packed};
  }
};

// Rows in 4 bits that come before the store's own in every sequence; or none.
struct PackedRows {
  std::optional<Store> store;
  std::optional<Extents> extents;
  std::optional<Buffers> buffers;

  PackedRows(const Store& own, const std::optional<Tensor>& key, const std::optional<Tensor>& value, const std::optional<Tensor>& starts,
             const std::optional<Tensor>& lengths, const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
    if (!key) return;
    STD_TORCH_CHECK(own.coded && value && starts && lengths && key_scale && value_scale, "packed rows come whole, before rows in int8");
    store.emplace(*key, *value, *starts, *lengths, key_scale, value_scale);
    STD_TORCH_CHECK(key->scalar_type() == ScalarType::Byte && store->sequences == own.sequences && 2 * store->size == own.size &&
                        2 * store->value_size == own.value_size,
                    "packed rows must be uint8, half as wide as the store's, in as many sequences");
    extents.emplace(*store, *starts, *lengths);
    buffers.emplace(*key, *value, key_scale, value_scale);
  }

  Run run(int64_t s) const { return store ? buffers->run(extents->starts[s], extents->lengths[s]) : Run{}; }
};

}  // namespace mixkv::cpu
