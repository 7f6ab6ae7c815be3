// What one set of CPU kernels offers. The same source is compiled once for each instruction set; `kernels()` picks a set at run time.
#pragma once

#include <stdint.h>

namespace mixkv {

enum Element { kFloat, kHalf, kBfloat16, kElements };

// A run of rows: rows of keys and of values, each a fixed number of elements apart.
struct Run {
  const void* key;
  const void* value;
  int64_t key_stride;
  int64_t value_stride;
  int64_t rows;
  // Of rows of codes: the scale of each row, in float16.
  const uint16_t* key_scale = nullptr;
  const uint16_t* value_scale = nullptr;
  // Whether codes have 4 bits, two to a byte, and not 8.
  bool packed = false;
};

// Query rows that attend to the same keys.
struct Queries {
  const void* const* rows;
  int count;
  int size;        // D
  int value_size;  // Dv
  float scaling;
  float softcap;  // 0: none
};

// What each query may see of a run. A null array restricts nothing.
struct Visible {
  const int64_t* limits;            // query i sees rows 0 .. limits[i]
  const uint8_t* const* masks;      // query i sees row r if masks[i][r * mask_stride]
  int64_t mask_stride;
};

// Softmax in progress for each query: the largest logit, the mass relative to it, and the weighted values.
struct State {
  float* maximum;  // [count]
  float* mass;     // [count]
  float* sum;      // [count, Dv]
};

struct Window {
  const void* query;  // W rows of one query head
  int64_t query_stride;
  const void* key;  // N rows
  int64_t key_stride;
  const uint8_t* valid;  // null: all tokens are
  int64_t valid_stride;
  int64_t window;
  int64_t tokens;  // N
  int size;         // D
  float scaling;
  float softcap;  // 0: none
  bool has_sink;
  float sink;
  bool squared;  // the root mean square over the queries, not the mean
};

// |F v| for rows v and a matrix F of `outputs` rows.
struct Projection {
  const void* value;  // N rows
  int64_t value_stride;
  int64_t rows;  // N
  const float* factor;  // [outputs, D]
  int64_t outputs;
  int size;  // D
};

// Query rows of one KV head, and the bounds of its chunks of keys: the largest element's level in the upper half of a code, the
// smallest's in the lower.
struct Bounds {
  const void* const* rows;
  int count;
  int size;  // D
  const uint8_t* codes;  // [chunks, D]
  const float* grid;  // [2, D]: the lowest level, and a step
  int64_t chunks;
};

// Rows of one head.
struct Rows {
  const void* data;
  int64_t stride;
  int64_t count;
  int size;  // D
  const uint8_t* valid;  // null: all rows are
  int64_t valid_stride;
};

struct ElementKernels {
  // Takes a run into the state. scratch: `attend_scratch` floats.
  void (*attend)(const Queries&, const Run&, const Visible*, const State&, float* scratch);
  // The same for a run of codes.
  void (*attend_codes)(const Queries&, const Run&, const Visible*, const State&, float* scratch);
  // Writes a row's codes in int8, and its scale in float16.
  void (*quantise)(const void* row, int size, int8_t* codes, uint16_t* scale);
  // Writes a row times an orthogonal matrix.
  void (*rotate)(const void* row, int size, float* out);
  // Writes the row that was rotated.
  void (*rotate_back)(const float* row, int size, void* out);
  // Writes query i's result to out[i]; sinks (may be null) holds one logit per query.
  void (*finish)(const State&, int count, int value_size, const float* sinks, void* const* out);
  // Writes the mean, or root mean square, over the window's queries for tokens 0 .. N - W. scratch: `window_scratch` floats.
  void (*window)(const Window&, float* out, float* scratch);
  // Writes the norms [N]. scratch: `norm_scratch` floats.
  void (*norm)(const Projection&, float* out, float* scratch);
  // Writes the bounds [chunks] of products with keys, the largest over the query rows. scratch: `bounds_scratch` floats.
  void (*bounds)(const Bounds&, float* out, float* scratch);
  // Writes the rows' norms.
  void (*norms)(const Rows&, float* out);
  // Writes inverse norms of all rows and the mean [D] of the unit rows that are valid. Returns how many are.
  int64_t (*direction)(const Rows&, float* inverse_norm, float* mean);
  // Writes the rows' products with a vector [D], each times its inverse norm.
  void (*cosines)(const Rows&, const float* direction, const float* inverse_norm, float* out);
};

struct Kernels {
  const char* name;
  ElementKernels of[kElements];
  // Writes a row's codes of 4 bits, and its scale in float16.
  void (*pack)(const float* row, int size, uint8_t* codes, uint16_t* scale);
  int64_t (*attend_scratch)(int count, int size);
  int64_t (*window_scratch)(int64_t tokens, int size);
  int64_t (*norm_scratch)(int64_t outputs, int size);
  int64_t (*bounds_scratch)(int size);
};

const Kernels& kernels();

}  // namespace mixkv
