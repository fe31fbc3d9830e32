// A whole model: weights, caches, and the forward pass over rows.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cache.h"
#include "matrix.h"
#include "runtime.h"
#include "understudy_cpu.h"

namespace understudy {

enum Linear { kQ, kK, kV, kO, kGate, kUp, kDown, kFc, kNumLinears };  // kFc: of heads
enum Norm { kInputNorm, kPostAttentionNorm, kQNorm, kKNorm, kHiddenNorm, kNumNorms };

struct Layer {
  std::array<Matrix, kNumLinears> linear;
  std::array<Buffer<float>, kNumNorms> norm;
};

// Rows of a file, or packed ones.
struct Embedding {
  const uint8_t* values = nullptr;
  Number number = Number::kFloat32;
  MatrixView packed;

  bool is_set() const { return values || packed.data; }
};

class Forward;
class Tree;
struct DraftStep;

// A causal language model, or an EAGLE head over the states of another model.
class Model {
 public:
  Model(std::shared_ptr<Runtime> runtime, const us_shape& shape);
  ~Model();

  void set_linear(int32_t layer, int32_t which, const us_weights& weights);
  void set_norm(int32_t layer, int32_t which, const float* values, int64_t count);
  void set_head(const us_weights& weights, const int64_t* ids);
  void set_embedding_int8(const us_weights& weights);
  void set_embedding(const void* values, Number number);
  void share_embedding(const Model& other);
  void finish();
  void add_rope(const float* cosine, const float* sine, int64_t count);

  void forward(const us_call& call);
  int64_t draft(const us_draft& draft);
  void keep(int64_t sequence, const int32_t* rows, int64_t count);
  void truncate(int64_t sequence, int64_t length);
  int64_t length(int64_t sequence) const;
  void reset(int64_t sequence);
  int64_t weight_bytes() const { return static_cast<int64_t>(arena_.allocated()); }
  int64_t cache_bytes() const;
  void time_phases(bool is_wanted);
  void phase_times(double* seconds) const;

 private:
  friend class Forward;
  struct RowToken {
    int32_t token, parent;
  };

  bool is_head() const { return shape_.num_features > 0; }
  int32_t expected_outputs(int32_t which) const;
  int32_t expected_inputs(int32_t which) const;
  void check_call(const us_call& call) const;
  void check_row(const us_call& call, int64_t index, int64_t first) const;
  void check_draft(const us_draft& draft) const;
  int32_t read_certain(const us_draft& draft, Sequence& sequence, DraftStep& step);
  void expand(const us_draft& draft, Tree& tree, int32_t root, DraftStep& step);
  void compute(const us_call& call);
  void lay_out_rows(const us_call& call);
  void place(RowPath& row, const RowPath* parent) const;
  Sequence& sequence_at(int64_t number);
  void drop_all_provisional();
  void drop_provisional(Sequence* sequence);
  void keep_rows(Sequence& sequence, const int32_t* rows, int64_t count);
  void embed(int32_t token, float* x) const;

  std::shared_ptr<Runtime> runtime_;
  us_shape shape_;
  Arena arena_;
  std::vector<Layer> layers_;
  Buffer<float> final_norm_;
  Matrix head_;
  std::vector<int64_t> head_ids_;  // of a trimmed vocabulary
  Embedding embedding_;
  Buffer<float> cosine_, sine_;
  BlockPool blocks_;  // of the sequences' keys and values
  std::unordered_map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<RowPath> rows_;  // of the last call and those that it continues
  std::vector<RowToken> row_tokens_;
  std::unique_ptr<Forward> forward_;
  mutable std::mutex mutex_;
};

}  // namespace understudy
