#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "forward.h"

namespace understudy {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Model::Model(std::shared_ptr<Runtime> runtime, const us_shape& shape) : runtime_(std::move(runtime)), shape_(shape) {
  if (shape.num_layers < 1 || shape.num_kv_heads < 1 || shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads)
    refuse("the numbers of layers and heads do not fit together");
  if (shape.head_dim < 16 || shape.head_dim % 16) refuse("head_dim is not a multiple of 16");
  const int32_t num_q = shape.num_heads * shape.head_dim;
  if (shape.hidden_size < kGroup || shape.hidden_size % kGroup || shape.intermediate_size < kGroup ||
      shape.intermediate_size % kGroup || num_q % kGroup)
    refuse("hidden_size, intermediate_size and num_heads·head_dim must be multiples of 32");
  layers_.resize(static_cast<size_t>(shape.num_layers));
}

Model::~Model() = default;

int32_t Model::expected_outputs(int32_t which) const {
  if (which == kQ) return shape_.num_heads * shape_.head_dim;
  if (which == kK || which == kV) return shape_.num_kv_heads * shape_.head_dim;
  return which == kGate || which == kUp ? shape_.intermediate_size : shape_.hidden_size;
}

int32_t Model::expected_inputs(int32_t which) const {
  if (which == kO) return shape_.num_heads * shape_.head_dim;
  return which == kDown ? shape_.intermediate_size : shape_.hidden_size;
}

void Model::set_linear(int32_t layer, int32_t which, const us_weights& weights) {
  if (layer < 0 || layer >= shape_.num_layers || which < 0 || which >= kNumLinears) refuse("there is no such layer");
  if (weights.outputs != expected_outputs(which) || weights.inputs != expected_inputs(which))
    refuse("the weight's shape is not the layer's");
  if (weights.bias && which > kV) refuse("only q, k and v may have a bias");
  layers_[static_cast<size_t>(layer)].linear[static_cast<size_t>(which)] =
      pack(weights, runtime_->kernels, runtime_->pool, arena_);
}

void Model::set_norm(int32_t layer, int32_t which, const float* values, int64_t count) {
  if (layer < -1 || layer >= shape_.num_layers || which < 0 || which >= kNumNorms) refuse("there is no such norm");
  const bool is_of_heads = layer >= 0 && (which == kQNorm || which == kKNorm);
  if (count != (is_of_heads ? shape_.head_dim : shape_.hidden_size)) refuse("the norm's size is not the layer's");
  Buffer<float>& target =
      layer < 0 ? final_norm_ : layers_[static_cast<size_t>(layer)].norm[static_cast<size_t>(which)];
  target.assign(values, values + count);
}

void Model::set_head(const us_weights& weights) {
  if (weights.inputs != shape_.hidden_size || weights.outputs > shape_.vocab_size || !weights.is_plain)
    refuse("the head must be plain, [at most vocab_size, hidden_size]");
  head_ids_.clear();
  if (weights.row_ids) {
    head_ids_.assign(weights.row_ids, weights.row_ids + weights.outputs);
    for (size_t i = 0; i < head_ids_.size(); ++i)
      if (head_ids_[i] < (i ? head_ids_[i - 1] + 1 : 0) || head_ids_[i] >= shape_.vocab_size)
        refuse("the head's row ids must ascend and be tokens of the vocabulary");
  } else if (weights.outputs != shape_.vocab_size) {
    refuse("the head's shape is not the model's");
  }
  head_ = pack(weights, runtime_->kernels, runtime_->pool, arena_);
}

void Model::set_embedding_int8(const us_weights& weights) {
  if (weights.inputs != shape_.hidden_size || weights.outputs != shape_.vocab_size || !weights.is_plain ||
      weights.row_ids)
    refuse("the embedding must be plain, [vocab_size, hidden_size]");
  embedding_int8_ = pack(weights, runtime_->kernels, runtime_->pool, arena_);
}

void Model::set_embedding(const void* values, Number number) {
  embedding_ = static_cast<const uint8_t*>(values);
  embedding_number_ = number;
}

void Model::finish() {
  for (const Layer& layer : layers_) {
    for (const Matrix& matrix : layer.linear)
      if (!matrix.view.data) refuse("a linear layer is missing");
    for (int which = 0; which < (shape_.has_qk_norm ? kNumNorms : kQNorm); ++which)
      if (layer.norm[static_cast<size_t>(which)].empty()) refuse("a norm is missing");
  }
  if (final_norm_.empty() || !head_.view.data) refuse("the final norm or the head is missing");
  if (!embedding_ && !embedding_int8_.view.data && !head_ids_.empty()) refuse("the embedding is missing");
  forward_ = std::make_unique<Forward>(*this);
}

void Model::add_rope(const float* cosine, const float* sine, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t numbers = count * (shape_.head_dim / 2);
  cosine_.insert(cosine_.end(), cosine, cosine + numbers);
  sine_.insert(sine_.end(), sine, sine + numbers);
}

void Model::embed(int32_t token, float* x) const {
  if (embedding_) {
    const size_t size = embedding_number_ == Number::kFloat32 ? 4 : 2;
    const size_t row = size * static_cast<size_t>(shape_.hidden_size);
    return runtime_->kernels.to_float32(embedding_ + row * static_cast<size_t>(token), embedding_number_,
                                        shape_.hidden_size, x);
  }
  runtime_->kernels.embed(embedding_int8_.view.data ? embedding_int8_.view : head_.view, token, x);
}

void Model::check_call(const us_call& call) const {
  if (!forward_) refuse("the model is not finished");
  if (call.num_rows < 1 || call.num_rows > (1 << 24)) refuse("a forward needs 1 to 2^24 rows");
  const auto covered = static_cast<int64_t>(cosine_.size()) / (shape_.head_dim / 2);
  for (int64_t i = 0; i < call.num_rows; ++i) {
    const std::string row = "row " + std::to_string(i);
    if (call.tokens[i] < 0 || call.tokens[i] >= shape_.vocab_size) refuse(row + ": no such token");
    const int32_t parent = call.parents[i];
    if (parent < -1 || parent >= i || (parent >= 0 && call.sequences[parent] != call.sequences[i]))
      refuse(row + ": the parent is not an earlier row of its sequence");
    const auto found = sequences_.find(call.sequences[i]);
    const int64_t kept = found == sequences_.end() ? 0 : found->second->length();
    if (call.positions[i] != (parent < 0 ? kept : call.positions[parent] + 1)) refuse(row + ": not the next position");
    if (call.positions[i] >= covered) refuse(row + ": no rotary table for its position");
  }
  for (int64_t i = 0; i < call.num_head_rows; ++i)
    if (call.head_rows[i] < 0 || call.head_rows[i] >= call.num_rows) refuse("a head row is not a row of the call");
  for (int64_t i = 0; i < call.num_taps; ++i)
    if (call.tap_layers[i] < (i ? call.tap_layers[i - 1] + 1 : 0) || call.tap_layers[i] > shape_.num_layers)
      refuse("taps must ascend and be layers of the model");
}

void Model::place(const us_call& call, int64_t index, int32_t slot) {
  RowPath& row = rows_[static_cast<size_t>(index)];
  row.position = call.positions[index];
  row.slot = slot;
  const int32_t parent = call.parents[index];
  const RowPath* before = parent < 0 ? nullptr : &rows_[static_cast<size_t>(parent)];
  row.tail = before ? before->tail : std::vector<int32_t>();
  if (row.tail.empty() && slot == row.position) {
    row.identity = row.position + 1;
    return;
  }
  row.identity = row.tail.empty() ? row.position : before->identity;
  row.tail.push_back(slot);
}

void Model::lay_out_rows(const us_call& call) {
  rows_.assign(static_cast<size_t>(call.num_rows), RowPath());
  row_tokens_.resize(static_cast<size_t>(call.num_rows));
  std::unordered_map<Sequence*, int32_t> ends;
  for (int64_t i = 0; i < call.num_rows; ++i) {
    std::unique_ptr<Sequence>& sequence = sequences_[call.sequences[i]];
    if (!sequence) sequence = std::make_unique<Sequence>(shape_.num_layers, shape_.num_kv_heads, shape_.head_dim);
    const int32_t slot = ends.emplace(sequence.get(), sequence->length()).first->second++;
    rows_[static_cast<size_t>(i)].sequence = sequence.get();
    row_tokens_[static_cast<size_t>(i)] = {call.tokens[i], call.parents[i]};
    place(call, i, slot);
  }
  for (const auto& [sequence, end] : ends) sequence->reserve(end);
}

void Model::forward(const us_call& call) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_call(call);
  lay_out_rows(call);
  forward_->run_call(call);
}

void Model::keep(int64_t sequence, const int32_t* rows, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    if (count) refuse("keep: no such sequence");
    return;
  }
  Sequence* kept = found->second.get();
  std::vector<int32_t> slots, tokens;
  int32_t parent = -1;
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<size_t>(rows[i]);
    if (rows[i] < 0 || index >= rows_.size() || rows_[index].sequence != kept || row_tokens_[index].parent != parent)
      refuse("keep: the rows are not a path of the last call");
    slots.push_back(rows_[index].slot);
    tokens.push_back(row_tokens_[index].token);
    parent = rows[i];
  }
  kept->keep(slots, tokens);
  drop_provisional(kept);
}

void Model::drop_provisional(const Sequence* sequence) {
  for (RowPath& row : rows_)
    if (row.sequence == sequence) row.sequence = nullptr;
}

void Model::truncate(int64_t sequence, int64_t length) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sequences_.find(sequence);
  if (length < 0 || length > (found == sequences_.end() ? 0 : found->second->length()))
    refuse("truncate: the sequence is shorter");
  if (found == sequences_.end()) return;
  found->second->truncate(static_cast<int32_t>(length));
  drop_provisional(found->second.get());
}

int64_t Model::length(int64_t sequence) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sequences_.find(sequence);
  return found == sequences_.end() ? 0 : found->second->length();
}

void Model::reset(int64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) return;
  drop_provisional(found->second.get());
  sequences_.erase(found);
}

int64_t Model::cache_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = 0;
  for (const auto& entry : sequences_) bytes += entry.second->bytes();
  return static_cast<int64_t>(bytes);
}

void Model::time_phases(bool is_wanted) {
  std::lock_guard<std::mutex> lock(mutex_);
  forward_->time_phases(is_wanted);
}

void Model::phase_times(double* seconds) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::copy(forward_->times().begin(), forward_->times().end(), seconds);
}

}  // namespace understudy
