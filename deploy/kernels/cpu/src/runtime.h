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

// Storage of Inputs.
class InputsBuffer {
 public:
  const Inputs& resize(int32_t rows, int32_t inputs) {
    const int32_t groups = inputs / kGroup;
    const size_t slots = static_cast<size_t>(rows) * static_cast<size_t>(groups);
    if (slots > scale_.size()) {
      codes_.resize(slots * kGroup);
      scale_.resize(slots);
      offset_.resize(slots);
      start_.resize(slots);
    }
    view_ = {codes_.data(), scale_.data(), offset_.data(), start_.data(), rows, groups};
    return view_;
  }
  const Inputs& view() const { return view_; }

 private:
  Buffer<int8_t> codes_;
  Buffer<float> scale_, offset_;
  Buffer<int32_t> start_;
  Inputs view_ = {};
};

constexpr size_t kDecodeScratch = 2 * kPanel * kTile;

}  // namespace understudy
