// What models and matrices share: the kernels of one instruction set and a pool of threads.
#pragma once

#include <memory>

#include "buffer.h"
#include "kernels.h"
#include "pool.h"

namespace understudy {

// The table for `isa`, or null where this build or this machine does not have it.
const Kernels* find_kernels(const char* isa);

struct Runtime {
  Runtime(const Kernels& chosen, int32_t threads) : kernels(chosen), pool(threads) {}
  const Kernels& kernels;
  Pool pool;
};

// What a linear layer reads, in the form that its matrix wants.
struct QuantizedInputs {
  bool is_by_row;
  Inputs in_groups;
  RowInputs by_row;
};

// Storage of quantized inputs, in turn of different layers and forms.
class InputsBuffer {
 public:
  // Makes room; what it holds is lost.
  void reserve(int32_t rows, int32_t columns) {
    const size_t slots = product(rows, columns / kGroup), count = static_cast<size_t>(rows);
    const size_t codes = product(rows + kRowsBehind, columns + kGroup);
    if (codes > codes_.size()) codes_.resize(codes);
    if (slots > scale_.size()) {
      scale_.resize(slots);
      offset_.resize(slots);
      start_.resize(slots);
    }
    if (count > total_.size()) {
      row_scale_.resize(count);
      total_.resize(count);
    }
  }
  QuantizedInputs in_groups(int32_t rows, int32_t inputs) {
    return {false, {codes_.data(), scale_.data(), offset_.data(), start_.data(), rows, inputs / kGroup}, {}};
  }
  QuantizedInputs by_row(int32_t rows, int32_t columns, bool is_for_tiles) {
    return {true,
            {},
            {codes_.data(), row_scale_.data(), total_.data(), start_.data(), rows, columns / kGroup, is_for_tiles}};
  }

 private:
  Buffer<int8_t> codes_;
  Buffer<float> scale_, offset_, row_scale_;
  Buffer<int32_t> start_, total_;
};

constexpr size_t kDecodeScratch = 2 * kPanel * kTile;

}  // namespace understudy
