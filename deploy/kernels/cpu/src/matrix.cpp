#include "matrix.h"

#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace understudy {

namespace {

constexpr int64_t kMostOutputs = 65535 * kTile;  // the items of one phase

size_t number_bytes(Number number) { return number == Number::kFloat32 ? 4 : 2; }


bool is_finite(const uint8_t* bytes, Number number) {
  if (number == Number::kFloat32) {
    uint32_t bits;
    std::memcpy(&bits, bytes, 4);
    return (bits & 0x7f800000) != 0x7f800000;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  const uint16_t exponent = number == Number::kFloat16 ? 0x7c00 : 0x7f80;
  return (bits & exponent) != exponent;
}

// Four nibbles to four bytes.
uint32_t spread(uint32_t nibbles) {
  const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ff;
  return (pairs | pairs << 4) & 0x0f0f0f0f;
}

// The grouped codes of a layer as they lie in the file (deploy/formats/packed.py).
class GroupedPacking : public Program {
 public:
  GroupedPacking(const us_weights& from, const MatrixView& to, uint8_t* data) : from_(from), to_(to), data_(data) {
    phases = {{0, 0, to.tiles()}};
  }

  void run(const Phase&, int32_t tile, int32_t) override {
    for (int32_t column = 0; column < kTile && tile * kTile + column < to_.outputs; ++column)
      pack_output(data_ + to_.tile_bytes * static_cast<size_t>(tile), column, row_of(tile * kTile + column));
  }

  bool is_finite_everywhere() const { return finite_; }

 private:
  int64_t row_of(int32_t output) const { return from_.row_ids ? from_.row_ids[output] : output; }

  void pack_output(uint8_t* tile, int32_t column, int64_t row) {
    const int64_t groups = from_.inputs / from_.group_size;
    pack_numbers(static_cast<const uint8_t*>(from_.scale), to_.scale_number, row * groups, groups, tile, column);
    uint8_t* minima = tile + to_.minimum_offset;
    if (to_.minimum == Minimum::kNumber) {
      pack_numbers(static_cast<const uint8_t*>(from_.minimum), to_.scale_number, row * groups, groups, minima, column);
    } else if (to_.minimum == Minimum::kZeroPoint) {
      for (int64_t g = 0; g < groups; ++g) minima[g * kTile + column] = zero_point(row, g, groups);
    }
    if (from_.bits == 4) {
      pack_nibbles(tile + to_.code_offset, column, row);
    } else {
      pack_bytes(tile + to_.code_offset, column, row);
    }
  }

  void pack_numbers(const uint8_t* source, Number number, int64_t first, int64_t count, uint8_t* to, int32_t column) {
    const size_t size = number_bytes(number);
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* value = source + size * static_cast<size_t>(first + g);
      if (!is_finite(value, number)) finite_ = false;
      std::memcpy(to + size * static_cast<size_t>(g * kTile + column), value, size);
    }
  }

  // Zero points are packed along the outputs, lowest bits first; without any the grid is symmetric.
  uint8_t zero_point(int64_t row, int64_t group, int64_t groups) const {
    if (!from_.minimum) return static_cast<uint8_t>(1 << (from_.bits - 1));
    if (from_.is_bytes) return static_cast<const uint8_t*>(from_.minimum)[row * groups + group] ^ 0x80;
    const auto* words = static_cast<const uint32_t*>(from_.minimum);
    const int64_t per_word = 32 / from_.bits;
    const uint32_t word = words[row / per_word * groups + group];
    return static_cast<uint8_t>(word >> (row % per_word * from_.bits) & ((1u << from_.bits) - 1));
  }

  void pack_nibbles(uint8_t* codes, int32_t column, int64_t row) const {
    const uint32_t* words = static_cast<const uint32_t*>(from_.codes) + row * (from_.inputs / 8);
    uint8_t* to = codes + column / 16 * 256 + column % 16 * 4;
    for (int32_t g = 0; g < to_.groups; ++g, to += 512)
      for (int32_t j = 0; j < 4; ++j) {
        const uint32_t word = words[4 * g + j];
        const uint32_t bytes = spread(word & 0xffff) | spread(word >> 16) << 4;
        std::memcpy(to + 64 * j, &bytes, 4);
      }
  }

  // Bytes may lie anywhere, words only where words do.
  void pack_bytes(uint8_t* codes, int32_t column, int64_t row) const {
    const uint8_t* source = static_cast<const uint8_t*>(from_.codes) + row * from_.inputs;
    const uint32_t flip = from_.is_bytes ? 0x80808080 : 0;  // code − 128 to code
    uint8_t* to = codes + column / 16 * 512 + column % 16 * 4;
    for (int32_t g = 0; g < to_.groups; ++g, to += 1024)
      for (int32_t j = 0; j < 8; ++j, source += 4) {
        uint32_t four;
        std::memcpy(&four, source, 4);
        four ^= flip;
        std::memcpy(to + 64 * j, &four, 4);
      }
  }

  const us_weights& from_;
  const MatrixView& to_;
  uint8_t* data_;
  std::atomic<bool> finite_{true};
};

// A plain matrix, quantized in groups of 32: to signed 8 bits, or to 4 bits with minima.
class PlainPacking : public Program {
 public:
  PlainPacking(const us_weights& from, const MatrixView& to, uint8_t* data, const Kernels& kernels, int32_t threads)
      : from_(from), to_(to), data_(data), kernels_(kernels), scratch_(static_cast<size_t>(threads)) {
    phases = {{0, 0, to.tiles()}};
    for (Scratch& scratch : scratch_) {
      scratch.row.resize(static_cast<size_t>(to.inputs));
      scratch.codes.resize(static_cast<size_t>(to.inputs));
      scratch.scale.resize(static_cast<size_t>(to.groups));
      scratch.nibbles.resize(static_cast<size_t>(to.inputs));
      scratch.halves.resize(2 * static_cast<size_t>(to.groups));
    }
  }

  void run(const Phase&, int32_t tile, int32_t thread) override {
    Scratch& scratch = scratch_[static_cast<size_t>(thread)];
    for (int32_t column = 0; column < kTile && tile * kTile + column < to_.outputs; ++column)
      pack_output(data_ + to_.tile_bytes * static_cast<size_t>(tile), column, tile * kTile + column, scratch);
  }

  bool is_finite_everywhere() const { return finite_; }

 private:
  struct Scratch {
    Buffer<float> row, scale;
    Buffer<int8_t> codes;
    Buffer<uint8_t> nibbles;
    Buffer<uint16_t> halves;  // scales, then minima
  };

  void pack_output(uint8_t* tile, int32_t column, int32_t output, Scratch& scratch) {
    const int64_t row = from_.row_ids ? from_.row_ids[output] : output;
    const auto number = static_cast<Number>(from_.scale_type);
    const size_t bytes = number_bytes(number) * static_cast<size_t>(from_.inputs);
    const auto* source = static_cast<const uint8_t*>(from_.codes) + bytes * static_cast<size_t>(row);
    kernels_.to_float32(source, number, to_.inputs, scratch.row.data());
    if (!kernels_.find_maximum(scratch.row.data(), to_.inputs).is_finite) finite_ = false;
    if (to_.bits == 4) return pack_nibbles(tile, column, scratch);
    kernels_.quantize_weights(scratch.row.data(), to_.inputs, scratch.codes.data(), scratch.scale.data());
    auto* scale = reinterpret_cast<float*>(tile) + column;
    uint8_t* to = tile + to_.code_offset + column / 16 * 512 + column % 16 * 4;
    for (int32_t g = 0; g < to_.groups; ++g, to += 1024) {
      scale[g * kTile] = scratch.scale[static_cast<size_t>(g)];
      for (int32_t j = 0; j < 8; ++j) {
        uint32_t four;
        std::memcpy(&four, scratch.codes.data() + kGroup * g + 4 * j, 4);
        four ^= 0x80808080;  // code + 128
        std::memcpy(to + 64 * j, &four, 4);
      }
    }
  }

  void pack_nibbles(uint8_t* tile, int32_t column, Scratch& scratch) {
    uint16_t *scales = scratch.halves.data(), *minima = scales + to_.groups;
    kernels_.quantize_weights4(scratch.row.data(), to_.inputs, scratch.nibbles.data(), scales, minima);
    auto* scale = reinterpret_cast<uint16_t*>(tile) + column;
    auto* minimum = reinterpret_cast<uint16_t*>(tile + to_.minimum_offset) + column;
    const uint8_t* codes = scratch.nibbles.data();
    uint8_t* to = tile + to_.code_offset + column / 16 * 256 + column % 16 * 4;
    for (int32_t g = 0; g < to_.groups; ++g, to += 512, codes += kGroup) {
      if (!is_finite_half(scales[g]) || !is_finite_half(minima[g])) finite_ = false;
      scale[g * kTile] = scales[g];
      minimum[g * kTile] = minima[g];
      for (int32_t j = 0; j < 4; ++j)
        for (int32_t i = 0; i < 4; ++i)
          to[64 * j + i] = static_cast<uint8_t>(codes[8 * j + i] | codes[8 * j + 4 + i] << 4);
    }
  }

  static bool is_finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

  const us_weights& from_;
  const MatrixView& to_;
  uint8_t* data_;
  const Kernels& kernels_;
  std::vector<Scratch> scratch_;
  std::atomic<bool> finite_{true};
};

int32_t shift_of(int32_t group_size) {
  switch (group_size) {
    case 32:
      return 0;
    case 64:
      return 1;
    case 128:
      return 2;
    default:
      throw std::invalid_argument("group_size=" + std::to_string(group_size) + " is not supported; use 32, 64 or 128");
  }
}

// Sums of products over all inputs stay within 32 bits up to here: 65536 · 255 · 127 < 2^31.
constexpr int64_t kMostColumns = 65536;

void check_inputs(const us_weights& from) {
  if (from.is_plain || (from.input_bits != 4 && from.input_bits != 8))
    throw std::invalid_argument("inputs of " + std::to_string(from.input_bits) + " bits do not fit; use 4 or 8");
  if (from.inputs > kMostColumns) throw std::invalid_argument("more than 65536 columns with one scale a row");
  const bool is_usable = from.input_scale == 0.0f || (from.input_scale >= 0x1p-126f && from.input_scale <= 0x1p126f);
  if (!is_usable) throw std::invalid_argument("the input scale is not a positive normal number");
  if (!from.flatten) return;
  if (from.input_scale == 0.0f) throw std::invalid_argument("flattened inputs need an input scale");
  for (int64_t i = 0; i < from.inputs; ++i) {
    const int64_t before = i ? from.flatten[i - 1] : -1, step = from.flatten[i] - before;
    if ((i == 0 || step != 0) && step != 1) throw std::invalid_argument("flatten must name every channel in order");
  }
  if ((int64_t{from.flatten[from.inputs - 1]} + 1) % kGroup)
    throw std::invalid_argument("the number of channels must be a multiple of 32");
}

void check(const us_weights& from) {
  if (from.inputs <= 0 || from.inputs % kGroup || from.outputs <= 0 || from.outputs > kMostOutputs)
    throw std::invalid_argument("a matrix of " + std::to_string(from.outputs) + " × " + std::to_string(from.inputs) +
                                " does not fit; inputs must be a multiple of 32");
  if (from.scale_type < 0 || from.scale_type > 2) throw std::invalid_argument("unknown number type");
  if (from.bits != 4 && from.bits != 8)
    throw std::invalid_argument("bits=" + std::to_string(from.bits) + " is not supported; use 4 or 8");
  if (!from.is_plain && (from.group_size <= 0 || from.inputs % from.group_size))
    throw std::invalid_argument("group_size does not divide inputs");
  if (from.is_bytes && (from.is_plain || from.bits != 8)) throw std::invalid_argument("bytes hold 8-bit codes only");
  if (from.input_bits) return check_inputs(from);
  if (from.flatten || from.input_scale != 0.0f) throw std::invalid_argument("an input scale needs input_bits");
}

MatrixView lay_out(const us_weights& from) {
  MatrixView view;
  view.outputs = static_cast<int32_t>(from.outputs);
  view.inputs = static_cast<int32_t>(from.inputs);
  view.groups = view.inputs / kGroup;
  view.bits = from.bits;
  view.is_signed = from.is_plain && from.bits == 8;
  view.is_channel = from.input_bits && from.group_size == from.inputs;
  view.group_shift = from.is_plain || view.is_channel ? 0 : shift_of(from.group_size);
  view.scale_number = static_cast<Number>(from.scale_type);
  if (from.is_plain) view.scale_number = view.is_signed ? Number::kFloat32 : Number::kFloat16;
  if (from.is_plain && !view.is_signed) view.minimum = Minimum::kNumber;
  if (!from.is_plain) view.minimum = from.has_float_minimum ? Minimum::kNumber : Minimum::kZeroPoint;
  if (from.input_bits && !from.minimum) {
    view.minimum = Minimum::kNone;
    view.zero = 1 << (from.bits - 1);
  }
  const size_t numbers = static_cast<size_t>(view.is_channel ? 1 : view.groups >> view.group_shift) * kTile;
  const size_t number = number_bytes(view.scale_number);
  const size_t minimum = view.minimum == Minimum::kNone ? 0 : view.minimum == Minimum::kNumber ? number : 1;
  view.minimum_offset = round_up(numbers * number, 64);
  view.code_offset = view.minimum_offset + round_up(numbers * minimum, 64);
  view.tile_bytes = view.code_offset + static_cast<size_t>(view.groups) * 4 * kGroup * static_cast<size_t>(view.bits);
  return view;
}

void set_inputs(Matrix& matrix, const us_weights& from) {
  matrix.qmax = (1 << (from.input_bits - 1)) - 1;
  matrix.input_scale = from.input_scale;
  matrix.channels = matrix.view.inputs;
  if (!from.flatten) return;
  matrix.flatten.assign(from.flatten, from.flatten + from.inputs);
  matrix.channels = matrix.flatten.back() + 1;
  matrix.offset.assign(matrix.flatten.size(), 0);
  for (size_t i = 1; i < matrix.flatten.size(); ++i)
    if (matrix.flatten[i] == matrix.flatten[i - 1]) matrix.offset[i] = matrix.offset[i - 1] + matrix.qmax;
}

}  // namespace

Matrix pack(const us_weights& from, const Kernels& kernels, Pool& pool, Arena& arena) {
  check(from);
  Matrix matrix;
  matrix.view = lay_out(from);
  if (from.input_bits) set_inputs(matrix, from);
  uint8_t* data = arena.allocate(matrix.view.tile_bytes * static_cast<size_t>(matrix.view.tiles()));
  bool is_finite_everywhere = true;
  if (from.is_plain) {
    PlainPacking packing(from, matrix.view, data, kernels, pool.threads());
    pool.execute(packing);
    is_finite_everywhere = packing.is_finite_everywhere();
  } else {
    GroupedPacking packing(from, matrix.view, data);
    pool.execute(packing);
    is_finite_everywhere = packing.is_finite_everywhere();
  }
  if (!is_finite_everywhere) throw std::invalid_argument("has a scale, minimum or weight that is not finite");
  if (from.bias) {
    matrix.bias.assign(static_cast<size_t>(matrix.view.tiles()) * kTile, 0.0f);
    std::memcpy(matrix.bias.data(), from.bias, sizeof(float) * static_cast<size_t>(from.outputs));
  }
  matrix.view.data = data;
  return matrix;
}

}  // namespace understudy
