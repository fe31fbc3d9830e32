// The operations that exist once per instruction set, behind a table of functions.
//
// The translation units that implement them are compiled for machines that may not be this one. They include nothing
// with inline functions of external linkage (no standard containers): the linker keeps one copy of such a function
// and could keep the one that only some machines can run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace understudy {

constexpr int kGroup = 32;      // inputs quantized together, and one visit of a weight group
constexpr int kTile = 32;       // outputs computed together: two vectors of 16
constexpr int kMaxBlock = 6;    // rows computed together
constexpr int kPanel = 64;      // groups whose scales are decoded at once
constexpr int kMaxRows = 128;   // rows of one pass through the layers
constexpr int kKeyBlock = 32;   // positions of one step of the softmax
constexpr int kRowsBehind = 15; // rows that tiles may have too many

enum class Number : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Minimum : int32_t { kNone = 0, kZeroPoint = 1, kNumber = 2 };

// A packed matrix; the layout of `data` is described in matrix.h.
struct MatrixView {
  const uint8_t* data = nullptr;
  size_t tile_bytes = 0, minimum_offset = 0, code_offset = 0;
  int32_t outputs = 0, inputs = 0;
  int32_t groups = 0;        // inputs / 32
  int32_t group_shift = 0;   // a weight group is visited 2^shift times
  int32_t bits = 0;
  bool is_signed = false;    // 8-bit codes stand for code − 128
  bool is_channel = false;   // one scale per output; only for inputs with one scale a row
  int32_t zero = 0;          // what all codes stand for the difference from, where there are no minima
  Number scale_number = Number::kFloat32;
  Minimum minimum = Minimum::kNone;
  const float* bias = nullptr;

  int32_t tiles() const { return (outputs + kTile - 1) / kTile; }
  const uint8_t* tile(int32_t index) const { return data + tile_bytes * static_cast<size_t>(index); }
};

// Rows are computed in blocks of nearly equal size, at most kMaxBlock.
struct RowBlock {
  int32_t first, count;
};
inline static int32_t num_blocks(int32_t rows) { return (rows + kMaxBlock - 1) / kMaxBlock; }
inline static RowBlock block_at(int32_t rows, int32_t index) {
  const int32_t blocks = num_blocks(rows), size = rows / blocks, larger = rows % blocks;
  const int32_t before = index < larger ? index : larger;
  return {index * size + before, size + (index < larger ? 1 : 0)};
}
inline static RowBlock block_of(int32_t rows, int32_t row) {
  const int32_t blocks = num_blocks(rows), size = rows / blocks, larger = rows % blocks;
  const int32_t edge = larger * (size + 1);
  return block_at(rows, row < edge ? row / (size + 1) : larger + (row - edge) / size);
}

// Quantized inputs. Within a block of rows, group by group: so every row's 32 codes of a group lie side by side.
// With total the sum of a group's codes, offset = −(scale · total) and start = −128 · total.
struct Inputs {
  int8_t* codes;
  float* scale;
  float* offset;
  int32_t* start;
  int32_t rows, groups;
};

// How a layer's inputs are quantized with one scale a row.
struct InputGrid {
  int32_t qmax = 0;                  // 0: there is no such grid, inputs are quantized in groups
  float scale = 0.0f;                // of every row; 0: each row finds its own
  int32_t channels = 0, columns = 0; // of a row, and of the weight
  const int32_t* flatten = nullptr;  // [columns] the channel of each, or null
  const int32_t* offset = nullptr;   // [columns] k·qmax, k the number of earlier columns of that channel
};

// Inputs with one scale a row; codes lie as above, group by group within a block of rows, or as tiles.inl says.
struct RowInputs {
  int8_t* codes;
  float* scale;     // [rows]
  int32_t* total;   // [rows] sum of a row's codes
  int32_t* totals;  // of each group, where the scales of `Inputs` would be; for tiles [groups][rows]
  int32_t rows, groups;
  bool is_for_tiles;
};

// One step of the softmax for the query heads that share a key/value head.
struct AttentionBlock {
  const float* q;       // [heads][head_dim]
  int32_t heads, head_dim, count;
  float score_scale;
  const float* keys;    // as `widen` leaves them
  const float* values;
  float* maximum;       // [heads]
  float* total;         // [heads]
  float* output;        // [heads][head_dim]
  float* weights;       // scratch: 32 · heads
};

// What decides a token's noise, besides the token.
struct NoiseKey {
  uint64_t seed, sample_index;
  uint32_t position;
};

struct Finite {
  float maximum;
  int32_t is_finite;
};

struct Kernels {
  // Whether a matrix is better multiplied with so many rows in tiles; all that read the same inputs have to want it.
  bool (*wants_tiles)(const MatrixView&, int32_t rows);
  // To be called on a thread before it multiplies so many rows in tiles, and again once other code may have run there.
  void (*begin_rows)(int32_t rows);
  // sums[row][32] = the outputs of one tile for every row, without bias. `next`: what will be read after this tile.
  void (*matmul_tile)(const MatrixView&, int32_t tile, const Inputs&, float* sums, float* scratch, const uint8_t* next);
  // y[row·stride + i] = sums[row][i] (+ bias[i]) for i < count
  void (*finish_store)(const float* sums, int32_t rows, int32_t count, const float* bias, float* y, size_t stride);
  // y += sums (+ bias)
  void (*finish_add)(const float* sums, int32_t rows, int32_t count, const float* bias, float* y, size_t stride);
  // group `group` of `out` = quantize(silu(gate) · up); biases may be null
  void (*finish_silu)(const float* gate, const float* up, int32_t rows, const Inputs& out, int32_t group);
  // row `row` of `out` = quantize(rms_norm(x) · weight), or quantize(x) where weight is null; scratch: 32 · groups
  void (*quantize)(const float* x, const float* weight, float eps, const Inputs& out, int32_t row, float* scratch);
  // The same for inputs with one scale a row; scratch of `quantize_row`: a number for each channel.
  void (*matmul_tile_rows)(const MatrixView&, int32_t tile, const RowInputs&, float* sums, float* scratch,
                           const uint8_t* next);
  void (*quantize_row)(const float* x, const float* weight, float eps, const InputGrid&, const RowInputs& out,
                       int32_t row, float* scratch);
  // y[row·stride + i] = silu(gate) · up for i < 32
  void (*store_silu)(const float* gate, const float* up, int32_t rows, float* y, size_t stride);
  void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float* y);
  void (*rotate)(float* x, const float* cosine, const float* sine, int32_t head_dim);
  void (*to_half)(const float* x, uint16_t* y, int32_t n);
  // `count` rows of halves [n] to floats, vector i of row p at [i][p]; `next`: what comes after, to be fetched, or null
  void (*widen)(const uint16_t* const* rows, int32_t count, int32_t n, const uint16_t* next, float* to);
  void (*attend)(const AttentionBlock&);
  void (*attend_finish)(const AttentionBlock&, float* out);
  // One row of a tile-packed int8 matrix as floats: the embedding of a tied model.
  void (*embed)(const MatrixView&, int32_t row, float* y);
  void (*to_float32)(const void* from, Number, int32_t n, float* to);
  // int8 codes and scales of a plain row of weights, n a multiple of 32
  void (*quantize_weights)(const float* x, int32_t n, int8_t* codes, float* scale);
  // the same in 4 bits, with scales and minima in fp16
  void (*quantize_weights4)(const float* x, int32_t n, uint8_t* codes, uint16_t* scale, uint16_t* minimum);
  // Sampling over n floats
  Finite (*find_maximum)(const float* x, int32_t n);
  void (*divide)(const float* x, float by, int32_t n, float* y);
  // Writes the indices of all x >= lowest, ascending, and returns how many; `indices` has room for n.
  int32_t (*find_above)(const float* x, float lowest, int32_t n, int32_t* indices);
  double (*sum_exp)(const float* x, float maximum, int32_t n);
  void (*exp_difference)(const float* x, float maximum, int32_t n, float* y);
  // log of a positive normal number
  float (*log)(float x);
  // z_i += the Gumbel noise of tokens_i
  void (*add_noise)(const NoiseKey&, const int32_t* tokens, int32_t n, float* z);
  // Ceilings for the benchmarks
  void (*measure_read)(const uint8_t* data, size_t bytes);
  void (*measure_dot)(int64_t rounds);
  double products_per_round;
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avxvnni();
const Kernels& kernels_avx512vnni();
const Kernels& kernels_amx();

}  // namespace understudy
