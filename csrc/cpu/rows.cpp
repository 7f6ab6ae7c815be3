// Operations that copy rows: append, compact, gather, move_rows, evict.
#include "rows.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "row_buffer.h"

namespace mixkv::cpu {

// Bytes that one thread copies before another is worth its start.
constexpr int64_t kGrain = 1 << 18;
// The same of rows of keys and values that it rotates.
constexpr int64_t kRowGrain = 256;

static void check_positions(const Store& store, const Tensor& position) {
  check_ints(position, store.rows, "position_buffer");
}

static int64_t grain(const Tensor& buffer, int64_t rows) {
  const int64_t bytes = rows * buffer.size(1) * int64_t(buffer.element_size()) * 2;
  return kGrain / (bytes + 1) + 1;
}

void append(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths, std::optional<Tensor> key_scale,
            std::optional<Tensor> value_scale, Tensor key, Tensor value, int64_t first_position, std::optional<Tensor> valid) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  check_positions(store, position_buffer);
  check_new(store, key_buffer, key, value);
  key = row_dense(key);
  value = row_dense(value);
  const int64_t heads = key.size(1), rows = key.size(2);
  if (valid) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->dim() == 2 && valid->size(0) == key.size(0) && valid->size(1) == rows,
                    "valid must be a bool [B, n] tensor");
  }
  const Extents extents(store, starts, lengths, valid ? 0 : rows);

  const int64_t bytes = key.element_size();
  const int64_t key_strides[] = {key.stride(0) * bytes, key.stride(1) * bytes, key.stride(2) * bytes};
  const int64_t value_strides[] = {value.stride(0) * bytes, value.stride(1) * bytes, value.stride(2) * bytes};
  const char* from_key = data<char>(key);
  const char* from_value = data<char>(value);
  const RowBuffer to_key(key_buffer, key_scale, &key), to_value(value_buffer, value_scale, &value);
  int32_t* to_position = data<int32_t>(position_buffer);
  int32_t* counts = data<int32_t>(lengths);
  const bool* real = valid ? data<bool>(*valid) : nullptr;
  const int64_t real_batch = valid ? valid->stride(0) : 0, real_row = valid ? valid->stride(1) : 0;
  if (valid) {
    for (int64_t b = 0; b < key.size(0); ++b) {
      int64_t count = 0;
      for (int64_t i = 0; i < rows; ++i) count += real[b * real_batch + i * real_row];
      for (int64_t s = b * heads; s < (b + 1) * heads; ++s)
        STD_TORCH_CHECK(extents.starts[s] + extents.lengths[s] + count <= store.rows, "sequence ", s, " has no room for ", count, " rows");
    }
  }

  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t b = s / heads, h = s % heads;
      int64_t row = extents.starts[s] + counts[s];
      for (int64_t i = 0; i < rows; ++i) {
        if (real && !real[b * real_batch + i * real_row]) continue;
        to_key.write(row, from_key + b * key_strides[0] + h * key_strides[1] + i * key_strides[2]);
        to_value.write(row, from_value + b * value_strides[0] + h * value_strides[1] + i * value_strides[2]);
        to_position[row] = int32_t(first_position + i);
        ++row;
      }
      counts[s] = int32_t(row - extents.starts[s]);
    }
  };
  if (store.sequences * rows * (to_key.bytes() + to_value.bytes()) <= kGrain) {
    work(0, store.sequences);
  } else {
    torch::stable::parallel_for(0, store.sequences, grain(key_buffer, rows), work);
  }
}

// Writes rows of `key`, `value` [B, Hkv, N, size] at `positions` behind the starts of sequences, which have so many each.
static void copy_rows(const RowBuffer& to_key, const RowBuffer& to_value, int32_t* to_position, const int32_t* starts, const int32_t* lengths,
                      const int32_t* offsets, const Tensor& key, const Tensor& value, const Tensor& positions, int64_t grain) {
  const int64_t heads = key.size(1), tokens = key.size(2), total = positions.numel();
  const int32_t* taken = data<int32_t>(positions);
  for (int64_t i = 0; i < total; ++i) STD_TORCH_CHECK(taken[i] >= 0 && taken[i] < tokens, "position ", taken[i], " is not below ", tokens);
  const int64_t bytes = key.element_size();
  const int64_t key_strides[] = {key.stride(0) * bytes, key.stride(1) * bytes, key.stride(2) * bytes};
  const int64_t value_strides[] = {value.stride(0) * bytes, value.stride(1) * bytes, value.stride(2) * bytes};
  const char* from_key = data<char>(key);
  const char* from_value = data<char>(value);
  torch::stable::parallel_for(0, key.size(0) * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const char* key_head = from_key + s / heads * key_strides[0] + s % heads * key_strides[1];
      const char* value_head = from_value + s / heads * value_strides[0] + s % heads * value_strides[1];
      const int32_t* tokens_taken = taken + offsets[s];
      for (int64_t i = 0, row = starts[s]; i < lengths[s]; ++i, ++row) {
        to_key.write(row, key_head + tokens_taken[i] * key_strides[2]);
        to_value.write(row, value_head + tokens_taken[i] * value_strides[2]);
        to_position[row] = tokens_taken[i];
      }
    }
  });
}

static void compact(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                    std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor offsets, Tensor key, Tensor value,
                    Tensor positions) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  check_positions(store, position_buffer);
  check_new(store, key_buffer, key, value);
  check_ints(offsets, store.sequences, "offsets");
  check_ints(positions, -1, "positions");
  key = row_dense(key);
  value = row_dense(value);
  const Extents extents(store, starts, lengths);
  const int64_t total = positions.numel();
  const int32_t* first = data<int32_t>(offsets);
  for (int64_t s = 0; s < store.sequences; ++s)
    STD_TORCH_CHECK(first[s] >= 0 && first[s] + extents.lengths[s] <= total, "offsets reach beyond the ", total, " positions");
  const RowBuffer to_key(key_buffer, key_scale, &key), to_value(value_buffer, value_scale, &value);
  copy_rows(to_key, to_value, data<int32_t>(position_buffer), extents.starts, extents.lengths, first, key, value, positions,
            grain(key_buffer, total / store.sequences));
}

static void move_rows(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths,
                      std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor from_key, Tensor from_value,
                      Tensor from_position, Tensor from_starts, std::optional<Tensor> from_key_scale,
                      std::optional<Tensor> from_value_scale, int64_t) {
  const Store to(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  const Store from(from_key, from_value, from_starts, lengths, from_key_scale, from_value_scale);
  check_positions(to, position_buffer);
  check_positions(from, from_position);
  STD_TORCH_CHECK(to.size == from.size && to.value_size == from.value_size && key_buffer.scalar_type() == from_key.scalar_type(),
                  "both stores must have one dtype and one head size");
  const Extents into(to, starts, lengths), out_of(from, from_starts, lengths);
  const RowBuffer to_key(key_buffer, key_scale), to_value(value_buffer, value_scale);
  const RowBuffer old_key(from_key, from_key_scale), old_value(from_value, from_value_scale);
  int32_t* to_position = data<int32_t>(position_buffer);
  const int32_t* old_position = data<int32_t>(from_position);
  torch::stable::parallel_for(0, to.sequences, grain(key_buffer, into.total / to.sequences), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t row = into.starts[s], old_row = out_of.starts[s], count = into.lengths[s];
      to_key.move(row, old_key, old_row, count);
      to_value.move(row, old_value, old_row, count);
      std::memcpy(to_position + row, old_position + old_row, count * sizeof(int32_t));
    }
  });
}

static int64_t spare_of(int64_t total, int64_t sequences, int64_t least, double share) {
  STD_TORCH_CHECK(sequences > 0 && least >= 0 && share >= 0.0, "there must be sequences, and no negative spare rows");
  return std::max(least, int64_t(double(total) / double(sequences) * share));
}

// New buffers of so many rows; scales have none where rows have no scales.
struct NewRows {
  Tensor key, value, position, key_scale, value_scale;
  std::optional<Tensor> of_key, of_value;

  NewRows(const Tensor& like, int64_t rows, int64_t size, int64_t value_size, ScalarType type, bool coded)
      : key(torch::stable::new_empty(like, {rows, size}, type)),
        value(torch::stable::new_empty(like, {rows, value_size}, type)),
        position(torch::stable::new_empty(like, {rows}, ScalarType::Int)),
        key_scale(torch::stable::new_empty(like, {coded ? rows : 0}, ScalarType::Half)),
        value_scale(torch::stable::new_empty(like, {coded ? rows : 0}, ScalarType::Half)) {
    if (coded) {
      of_key = key_scale;
      of_value = value_scale;
    }
  }

  void clear(int64_t first, int64_t count) const {
    RowBuffer(key, of_key).clear(first, count);
    RowBuffer(value, of_value).clear(first, count);
    std::memset(data<int32_t>(position) + first, 0, count * sizeof(int32_t));
  }
};

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gather(Tensor key, Tensor value, Tensor positions, Tensor counts,
                                                                                 bool codes, bool rotate, bool pack, int64_t spare_rows,
                                                                                 double spare_share) {
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "key and value must be [B, Hkv, n, size]");
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(key.size(d) == value.size(d), "key and value must agree in all but their last dimension");
  STD_TORCH_CHECK(is_floating(key) && value.scalar_type() == key.scalar_type(), "key and value must have one dtype, and a floating one");
  STD_TORCH_CHECK(rotate ? codes : !pack, "only rows in codes are rotated, and only rotated rows are packed");
  key = row_dense(key);
  value = row_dense(value);
  const int64_t sequences = key.size(0) * key.size(1);
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.numel() == sequences,
                  "counts must be contiguous int64 with an entry for every sequence");
  check_ints(positions, -1, "positions");
  Tensor starts = torch::stable::new_empty(positions, {sequences}, ScalarType::Int);
  Tensor lengths = torch::stable::new_empty(positions, {sequences}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(positions, {sequences}, ScalarType::Int);
  const int64_t total = positions.numel(), spare = spare_of(total, sequences, spare_rows, spare_share);
  int64_t row = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t count = data<int64_t>(counts)[s];
    STD_TORCH_CHECK(count >= 0 && row + count <= total, "counts must sum to the ", total, " positions");
    data<int32_t>(starts)[s] = int32_t(row + s * spare);
    data<int32_t>(lengths)[s] = int32_t(count);
    data<int32_t>(offsets)[s] = int32_t(row);
    row += count;
  }
  STD_TORCH_CHECK(row == total, "counts must sum to the ", total, " positions");
  const int64_t rows = total + sequences * spare;
  const int64_t each = pack ? 2 : 1;  // codes in a byte
  const NewRows to(key, rows, key.size(3) / each, value.size(3) / each, pack ? ScalarType::Byte : codes ? ScalarType::Char : key.scalar_type(),
                   codes);
  check_flat(to.key, "key", codes);
  check_flat(to.value, "value", codes);
  STD_TORCH_CHECK(key.size(3) % 16 == 0 && value.size(3) % 16 == 0, "head sizes must be multiples of 16");
  copy_rows(RowBuffer(to.key, to.of_key, &key, rotate), RowBuffer(to.value, to.of_value, &value, rotate), data<int32_t>(to.position),
            data<int32_t>(starts), data<int32_t>(lengths), data<int32_t>(offsets), key, value, positions,
            rotate ? kRowGrain / (total / sequences + 1) + 1 : grain(to.key, total / sequences));
  for (int64_t s = 0; s < sequences; ++s) to.clear(data<int32_t>(starts)[s] + data<int32_t>(lengths)[s], spare);
  return {to.key, to.value, to.position, starts, lengths, to.key_scale, to.value_scale};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> evict(
    Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths, std::optional<Tensor> key_scale,
    std::optional<Tensor> value_scale, Tensor ranks, Tensor quota, int64_t tail, int64_t spare_rows, double spare_share) {
  const Store store(key_buffer, value_buffer, starts, lengths, key_scale, value_scale);
  check_positions(store, position_buffer);
  check_ints(ranks, -1, "ranks");
  STD_TORCH_CHECK(quota.dim() == 1 && quota.scalar_type() == ScalarType::Long && quota.is_contiguous() && quota.numel() == store.sequences,
                  "quota must be a contiguous int64 vector with an entry for every sequence");
  const Extents from(store, starts, lengths);
  const int32_t* rank = data<int32_t>(ranks);
  const int64_t* most = data<int64_t>(quota);
  for (int64_t s = 0; s < store.sequences; ++s)
    STD_TORCH_CHECK(tail >= 0 && from.lengths[s] >= tail, "sequence ", s, " has ", from.lengths[s], " rows, fewer than the tail of ", tail);
  STD_TORCH_CHECK(from.total - store.sequences * tail == ranks.numel(), "there are ", ranks.numel(), " ranks for ",
                  from.total - store.sequences * tail, " selected rows");

  Tensor new_starts = torch::stable::new_empty(starts, {store.sequences}, ScalarType::Int);
  Tensor new_lengths = torch::stable::new_empty(starts, {store.sequences}, ScalarType::Int);
  int32_t *to_starts = data<int32_t>(new_starts), *to_lengths = data<int32_t>(new_lengths);
  int64_t total = 0;
  for (int64_t s = 0, i = 0; s < store.sequences; ++s) {
    int64_t count = tail;
    for (int64_t n = tail; n < from.lengths[s]; ++n, ++i) count += rank[i] < most[s];
    to_lengths[s] = int32_t(count);
    total += count;
  }
  const int64_t spare = spare_of(total, store.sequences, spare_rows, spare_share);
  const int64_t rows = total + store.sequences * spare;
  const NewRows to(key_buffer, rows, store.size, store.value_size, key_buffer.scalar_type(), store.coded);
  Tensor left = torch::stable::new_empty(ranks, {total - store.sequences * tail}, ScalarType::Int);
  const RowBuffer old_key(key_buffer, key_scale), old_value(value_buffer, value_scale);
  const RowBuffer to_key(to.key, to.of_key), to_value(to.value, to.of_value);
  const int32_t* old_position = data<int32_t>(position_buffer);
  int32_t *to_position = data<int32_t>(to.position), *to_rank = data<int32_t>(left);
  int64_t row = 0;
  for (int64_t s = 0; s < store.sequences; ++s) {
    to_starts[s] = int32_t(row);
    const int64_t first = from.starts[s], selected = from.lengths[s] - tail;
    for (int64_t n = 0; n < from.lengths[s]; ++n) {
      if (n < selected) {
        const int32_t place = *rank++;
        if (place >= most[s]) continue;
        *to_rank++ = place;
      }
      to_key.move(row, old_key, first + n, 1);
      to_value.move(row, old_value, first + n, 1);
      to_position[row++] = old_position[first + n];
    }
    to.clear(row, spare);
    row += spare;
  }
  return {to.key, to.value, to.position, new_starts, new_lengths, to.key_scale, to.value_scale, left};
}

}  // namespace mixkv::cpu

STABLE_TORCH_LIBRARY_IMPL(mixkv, CPU, m) {
  m.impl("append", TORCH_BOX(&mixkv::cpu::append));
  m.impl("compact", TORCH_BOX(&mixkv::cpu::compact));
  m.impl("move_rows", TORCH_BOX(&mixkv::cpu::move_rows));
  m.impl("gather", TORCH_BOX(&mixkv::cpu::gather));
  m.impl("evict", TORCH_BOX(&mixkv::cpu::evict));
}
