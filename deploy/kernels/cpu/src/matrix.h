// Packing weights into the layout that the kernels read.
//
// A matrix [outputs, inputs] is cut into tiles of 32 outputs; one tile lies in one piece, in the order of reading:
//
//   scales   [inputs/group][32]   fp32, or the 16-bit type that they came in; one group with a scale per output
//   minima   [inputs/group][32]   zero points in a byte each, or numbers like the scales; none for signed codes, nor
//                                 for a symmetric grid whose inputs have one scale a row
//   codes    [inputs/32][2][…]    two vectors of 16 outputs; within one, vectors of 64 bytes:
//              4 bits: 4 vectors, vector j byte 4c+i: inputs 8j+i (low nibble) and 8j+4+i (high nibble) of output c
//              8 bits: 8 vectors, vector j byte 4c+i: input 4j+i of output c
//
// Each part starts at a multiple of 64 bytes. Outputs that fill up the last tile have scale 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "memory.h"
#include "understudy_cpu.h"

namespace understudy {

class Pool;

struct Matrix {
  MatrixView view;
  Buffer<float> bias;  // padded to whole tiles
  // How what it multiplies is quantized, where its file says so.
  int32_t qmax = 0, channels = 0;
  float input_scale = 0.0f;
  Buffer<int32_t> flatten, offset;

  // Numbers of a row that it multiplies, before they are quantized.
  int32_t width() const { return qmax ? channels : view.inputs; }
  InputGrid grid() const {
    const bool is_flattened = !flatten.empty();
    return {qmax,        input_scale,
            channels,    view.inputs,
            is_flattened ? flatten.data() : nullptr, is_flattened ? offset.data() : nullptr};
  }
  // Whether a row gives the same codes for both.
  bool has_inputs_of(const Matrix& other) const {
    return qmax == other.qmax && input_scale == other.input_scale && channels == other.channels &&
           flatten == other.flatten;
  }
};

// Packs on all threads of `pool`. Throws std::invalid_argument for what does not fit together.
Matrix pack(const us_weights& from, const Kernels& kernels, Pool& pool, Arena& arena);

}  // namespace understudy
