// RowBuffer: a buffer of rows that are written, moved and cleared, as they are or as codes with a scale each.
#pragma once

#include <cstring>

#include "store.h"

namespace mixkv {

class RowBuffer {
 public:
  // `source`: what `write` reads, in float32, float16 or bfloat16; null: rows are moved only. `rotate`: `write` rotates rows first,
  // which are to be codes.
  RowBuffer(const Tensor& buffer, const std::optional<Tensor>& scale, const Tensor* source = nullptr, bool rotate = false)
      : rows_(data<char>(buffer)),
        size_(int(buffer.size(1))),
        bytes_(buffer.size(1) * int64_t(buffer.element_size())),
        scale_(scale ? data<uint16_t>(*scale) : nullptr),
        rotate_(rotate ? kernels().of[element_of(*source)].rotate : nullptr),
        pack_(buffer.scalar_type() == ScalarType::Byte ? kernels().pack : nullptr),
        quantise_(scale && source ? kernels().of[rotate ? kFloat : element_of(*source)].quantise : nullptr) {}

  int64_t bytes() const { return bytes_; }

  void write(int64_t row, const char* from) const {
    if (rotate_ != nullptr) {
      float turned[256];
      if (pack_ != nullptr) {
        rotate_(from, 2 * size_, turned);
        pack_(turned, 2 * size_, reinterpret_cast<uint8_t*>(rows_ + row * bytes_), scale_ + row);
      } else {
        rotate_(from, size_, turned);
        quantise_(turned, size_, reinterpret_cast<int8_t*>(rows_ + row * bytes_), scale_ + row);
      }
    } else if (quantise_ != nullptr) {
      quantise_(from, size_, reinterpret_cast<int8_t*>(rows_ + row * bytes_), scale_ + row);
    } else {
      std::memcpy(rows_ + row * bytes_, from, bytes_);
    }
  }

  // `count` rows of `from`, of the same format, from its row `from_row` on.
  void move(int64_t row, const RowBuffer& from, int64_t from_row, int64_t count) const {
    std::memcpy(rows_ + row * bytes_, from.rows_ + from_row * bytes_, count * bytes_);
    if (scale_ != nullptr) std::memcpy(scale_ + row, from.scale_ + from_row, count * sizeof(uint16_t));
  }

  // Zeros, so that a masked read of spare rows never meets a nan.
  void clear(int64_t first, int64_t count) const {
    std::memset(rows_ + first * bytes_, 0, count * bytes_);
    if (scale_ != nullptr) std::memset(scale_ + first, 0, count * sizeof(uint16_t));
  }

 private:
  char* rows_;
  int size_;
  int64_t bytes_;
  uint16_t* scale_;
  void (*rotate_)(const void*, int, float*);
  void (*pack_)(const float*, int, uint8_t*, uint16_t*);
  void (*quantise_)(const void*, int, int8_t*, uint16_t*);
};

}  // namespace mixkv
