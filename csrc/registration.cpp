// The operations' schemas. csrc/cpu and csrc/cuda register what implements them.
#include <torch/csrc/stable/library.h>

#define MIXKV_BUFFERS "Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor(c!) position_buffer, Tensor starts, "
#define MIXKV_SCALES "Tensor(e!)? key_scale, Tensor(f!)? value_scale, "
#define MIXKV_STORE "Tensor key_buffer, Tensor value_buffer, Tensor starts, Tensor lengths, Tensor? key_scale, Tensor? value_scale, "
#define MIXKV_PACKED \
  "Tensor? packed_key, Tensor? packed_value, Tensor? packed_starts, Tensor? packed_lengths, Tensor? packed_key_scale, " \
  "Tensor? packed_value_scale, "
#define MIXKV_LOGITS "int max_length, float scaling, float softcap, Tensor? sinks"

STABLE_TORCH_LIBRARY(mixkv, m) {
  m.def("append(" MIXKV_BUFFERS "Tensor(d!) lengths, " MIXKV_SCALES "Tensor key, Tensor value, int first_position, Tensor? valid=None) -> ()");
  m.def("attend(Tensor query, " MIXKV_STORE MIXKV_PACKED MIXKV_LOGITS ") -> Tensor");
  m.def("append_attend(Tensor query, " MIXKV_BUFFERS "Tensor(d!) lengths, " MIXKV_SCALES MIXKV_PACKED
        "Tensor key, Tensor value, int first_position, bool rotate, " MIXKV_LOGITS ") -> Tensor");
  m.def("step(Tensor query, " MIXKV_BUFFERS "Tensor(d!) lengths, " MIXKV_SCALES "Tensor ends, Tensor evicted, Tensor key, Tensor value, "
        MIXKV_LOGITS ") -> Tensor");
  m.def("attend_extend(Tensor query, " MIXKV_STORE MIXKV_PACKED "Tensor key, Tensor value, Tensor? mask, " MIXKV_LOGITS ") -> Tensor");
  m.def("chunk_scores(Tensor query, Tensor codes, Tensor grid, Tensor starts, Tensor counts, int longest) -> Tensor");
  m.def("attend_chunks(Tensor query, " MIXKV_STORE "Tensor chunk_key, Tensor chunk_value, Tensor blocks, Tensor block_rows, int chunk, "
        MIXKV_LOGITS ") -> Tensor");
  m.def("fetch_chunks(Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor from_key, Tensor from_value, Tensor from_rows, "
        "Tensor to_rows, Tensor rows, int chunk) -> ()");
  m.def("compact(" MIXKV_BUFFERS "Tensor lengths, " MIXKV_SCALES "Tensor offsets, Tensor key, Tensor value, Tensor positions) -> ()");
  m.def("move_rows(" MIXKV_BUFFERS "Tensor lengths, " MIXKV_SCALES "Tensor from_key, Tensor from_value, Tensor from_position, "
        "Tensor from_starts, Tensor? from_key_scale, Tensor? from_value_scale, int max_length) -> ()");
  m.def("window_scores(Tensor query, Tensor key, Tensor? valid, float scaling, bool squared, bool reduce_max, float softcap, "
        "Tensor? sinks) -> Tensor");
  m.def("importance(Tensor query, Tensor key, Tensor? value, Tensor? factor, Tensor? valid, float scaling, bool reduce_max, "
        "float softcap, Tensor? sinks, int kernel_size, bool largest) -> Tensor");
  m.def("row_norms(Tensor rows) -> Tensor");
  m.def("diversity(Tensor key, Tensor? valid) -> (Tensor, Tensor)");
  m.def("match(Tensor raw, Tensor reference, Tensor? valid) -> Tensor");
  m.def("places(Tensor score) -> (Tensor, Tensor)");
  m.def("ada_counts(Tensor importance, Tensor base, Tensor totals) -> Tensor");
  m.def("take(Tensor ranks, Tensor entries, Tensor? window, int width) -> (Tensor, Tensor, Tensor)");
  m.def("mix(Tensor importance, Tensor similarity, Tensor value_norm, Tensor share, Tensor? valid) -> Tensor");
  m.def("normalized(Tensor importance, float exponent) -> Tensor");
  m.def("gather(Tensor key, Tensor value, Tensor positions, Tensor counts, bool codes, bool rotate, bool pack, int spare_rows, "
        "float spare_share) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_largest(Tensor value, Tensor owner, Tensor within, Tensor importance, Tensor own_totals, Tensor totals, Tensor base, "
        "Tensor candidates, Tensor least, Tensor limit, float floor) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("evict(Tensor key_buffer, Tensor value_buffer, Tensor position_buffer, Tensor starts, Tensor lengths, Tensor? key_scale, "
        "Tensor? value_scale, Tensor ranks, Tensor quota, int tail, int spare_rows, float spare_share) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
