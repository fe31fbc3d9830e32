// The forward pass as a program of phases over a chunk of at most kMaxRows rows.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "model.h"
#include "sampling.h"

namespace understudy {

// Asks for memory that will be read soon.
inline void fetch(const void* from, size_t bytes) {
  const auto* line = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

class Forward : public Program {
 public:
  explicit Forward(Model& model);

  // What a phase is counted as when forward passes are timed; names in deploy/kernels/cpu/library.py.
  static constexpr int32_t kNumTimes = US_NUM_TIMES;

  void run_call(const us_call& call);
  void time_phases(bool is_wanted);
  const std::array<double, kNumTimes>& times() const { return times_; }
  void run(const Phase& phase, int32_t item, int32_t thread) override;

 private:
  enum Kind : int32_t {
    kTap,
    kEmbed,
    kFuse,     // heads: the state of a row from its features
    kJoin,     // heads: embedding and state, normed and side by side
    kPrepare,  // quantize what enters the next linear layers, where many rows share the work
    kQkv,
    kRotate,
    kAttend,
    kOutput,
    kGateUp,
    kDown,
    kHead,
    kChoose,
  };
  // What a linear layer reads.
  enum Source : int32_t { kFeatures, kAttentionNorm, kAttentionOutput, kMlpNorm, kHidden, kHeadNorm, kNumSources };
  struct Spot {
    const Matrix* matrix;
    int32_t tile;
  };
  // Which positions' keys and values a thread holds as floats, from the current block's first on.
  struct Widened {
    const Sequence* sequence;
    int32_t count;
  };
  struct Scratch {
    Buffer<float> sums, other_sums, decode, norm, attention, output;
    InputsBuffer inputs;
    int64_t prepared = -1;
    std::pair<int64_t, int32_t> begun{-1, 0};  // program and rows that its thread is ready to multiply in tiles
    std::unique_ptr<Sampler> sampler;
  };

  void run_rows(int64_t begin, int64_t end);
  void begin_rows(int64_t begin, int64_t end);
  void begin_head(const std::vector<int64_t>& head_rows, size_t first);
  void execute();
  void choose_alone();
  void add_input_phases();
  void add_layer_phases(int32_t layer);
  void add_source(Source source, int32_t layer, int32_t rows);
  void add(Kind kind, int32_t layer, int32_t items) { phases.push_back({kind, layer, items}); }

  Spot spot(int32_t kind, int32_t layer, int32_t item) const;
  const uint8_t* next_after(const Phase& phase, int32_t item, int32_t thread) const;
  int32_t items_of(int32_t kind, int32_t layer) const;
  QuantizedInputs inputs_for(Source source, int32_t layer, int32_t thread);
  QuantizedInputs down_inputs(int32_t layer, int32_t thread);
  QuantizedInputs view_of(InputsBuffer& buffer, Source source, int32_t layer) const;
  void quantize_row(Source source, int32_t layer, int32_t row, const QuantizedInputs& to, Scratch& scratch);
  int32_t columns_of(Source source, int32_t layer) const;
  // One of the matrices that read `source`: they agree in how their inputs are quantized.
  const Matrix& reader_of(Source source, int32_t layer) const;
  int32_t rows_of(Source source) const { return source == kHeadNorm ? num_head_ : num_rows_; }
  int32_t width_of(Source source) const;
  // Whether all matrices that read `source` do.
  bool wants_tiles(Source source, int32_t layer, int32_t rows) const;
  void multiply(const Spot& at, const QuantizedInputs& in, Buffer<float>& sums, Scratch& scratch, const uint8_t* next);

  void join(int32_t row, Scratch& scratch);
  void run_fuse(const Phase& phase, int32_t item, int32_t thread);
  void run_qkv(const Phase& phase, int32_t item, int32_t thread);
  void run_into_residual(const Phase& phase, int32_t item, int32_t thread, const QuantizedInputs& in);
  void run_gate_up(const Phase& phase, int32_t item, int32_t thread);
  void run_head_tile(const Phase& phase, int32_t item, int32_t thread);
  void rotate(int32_t layer, int32_t row, int32_t head);
  void run_attention(int32_t layer, int32_t group, int32_t head, int32_t thread);
  void attend(int32_t layer, int32_t group, int32_t head, int32_t thread);
  void fetch_inputs(const Phase& phase, int32_t item, int32_t thread, const QuantizedInputs& inputs) const;
  void fetch_output_weights(int32_t layer, int32_t thread, int32_t slice, int32_t slices) const;
  float* state_of(Scratch& scratch, int32_t index) const;
  AttentionBlock attention_block(int32_t row, int32_t index, int32_t head, int32_t count, Scratch& scratch) const;
  void fetch_first_block(int32_t layer, int32_t head, const RowPath& at, const RowPath& next) const;
  void widen(int32_t layer, int32_t head, const RowPath& at, int32_t begin, int32_t count, Widened& widened,
             Scratch& scratch);
  void choose(int32_t row, Scratch& scratch);
  const RowPath& path(int32_t row) const { return model_.rows_[static_cast<size_t>(first_ + begin_ + row)]; }
  // The residual stream of row number `index` among those in x_.
  float* state(int64_t index) { return &x_[static_cast<size_t>(index) * static_cast<size_t>(shape_.hidden_size)]; }
  float* residual(int32_t row) { return state(is_head_ ? first_ + begin_ + row : row); }

  Model& model_;
  const us_shape& shape_;
  const Kernels& kernels_;
  const int32_t num_q_, num_kv_, repeat_;
  const float score_scale_;
  const bool is_head_;
  const us_call* call_ = nullptr;
  int64_t first_ = 0;  // rows of earlier calls that this one continues
  int64_t begin_ = 0;  // of the rows that run now, in this call
  int32_t num_rows_ = 0, num_head_ = 0, group_rows_ = 1, num_groups_ = 0;
  bool rotates_first_ = false;
  bool hidden_by_row_ = false;  // in some layer
  std::array<double, kNumTimes> times_{};  // seconds
  int64_t serial_ = 0;  // of the program, so that no thread takes old inputs for new ones
  Buffer<float> x_;  // of the rows that run now; of a head all provisional rows: their children read it
  Buffer<float> qkv_, attention_, joined_, logits_;
  Buffer<float> hidden_rows_;  // what enters `down` where that quantizes whole rows; elsewhere hidden_ alone is written
  std::vector<float*> logit_rows_;
  std::vector<int64_t> head_indices_;
  std::array<InputsBuffer, kNumSources> shared_;
  InputsBuffer hidden_;
  std::vector<Scratch> scratch_;
};

}  // namespace understudy
