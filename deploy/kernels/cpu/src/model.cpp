#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "forward.h"

namespace understudy {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Model::Model(std::shared_ptr<Runtime> runtime, const us_shape& shape)
    : runtime_(std::move(runtime)),
      shape_(shape),
      blocks_(Sequence::block_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim)) {
  if (shape.num_layers < 1 || shape.num_kv_heads < 1 || shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads)
    refuse("the numbers of layers and heads do not fit together");
  if (shape.head_dim < 16 || shape.head_dim % 16) refuse("head_dim is not a multiple of 16");
  const int32_t num_q = shape.num_heads * shape.head_dim;
  if (shape.hidden_size < kGroup || shape.hidden_size % kGroup || shape.intermediate_size < kGroup ||
      shape.intermediate_size % kGroup || num_q % kGroup)
    refuse("hidden_size, intermediate_size and num_heads·head_dim must be multiples of 32");
  if (shape.num_features < 0 || shape.num_features > 64) refuse("num_features is out of range");
  if (is_head() && (shape.num_layers != 1 || shape.has_qk_norm)) refuse("a head has one layer, without QK norm");
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
  if (which == kFc) return shape_.num_features * shape_.hidden_size;
  if (which <= kV && is_head()) return 2 * shape_.hidden_size;
  return which == kDown ? shape_.intermediate_size : shape_.hidden_size;
}

void Model::set_linear(int32_t layer, int32_t which, const us_weights& weights) {
  if (layer < 0 || layer >= shape_.num_layers || which < 0 || which >= (is_head() ? kNumLinears : kFc))
    refuse("there is no such layer");
  if (weights.bias && which > kV) refuse("only q, k and v may have a bias");
  if (weights.input_bits && is_head()) refuse("a head quantizes its inputs in groups");
  if (weights.outputs != expected_outputs(which)) refuse("the weight's shape is not the layer's");
  Matrix matrix = pack(weights, runtime_->kernels, runtime_->pool, arena_);
  if (matrix.width() != expected_inputs(which)) refuse("the weight's shape is not the layer's");
  layers_[static_cast<size_t>(layer)].linear[static_cast<size_t>(which)] = std::move(matrix);
}

void Model::set_norm(int32_t layer, int32_t which, const float* values, int64_t count) {
  if (layer < -1 || layer >= shape_.num_layers || which < 0 || which >= kNumNorms) refuse("there is no such norm");
  const bool is_of_heads = layer >= 0 && (which == kQNorm || which == kKNorm);
  if (count != (is_of_heads ? shape_.head_dim : shape_.hidden_size)) refuse("the norm's size is not the layer's");
  Buffer<float>& target =
      layer < 0 ? final_norm_ : layers_[static_cast<size_t>(layer)].norm[static_cast<size_t>(which)];
  target.assign(values, values + count);
}

void Model::set_head(const us_weights& weights, const int64_t* ids) {
  if (weights.inputs != shape_.hidden_size || weights.outputs > shape_.vocab_size || !weights.is_plain)
    refuse("the head must be plain, [at most vocab_size, hidden_size]");
  head_ids_.clear();
  if (ids) {
    head_ids_.assign(ids, ids + weights.outputs);
    for (size_t i = 0; i < head_ids_.size(); ++i)
      if (head_ids_[i] < (i ? head_ids_[i - 1] + 1 : 0) || head_ids_[i] >= shape_.vocab_size)
        refuse("the head's ids must ascend and be tokens of the vocabulary");
  } else if (weights.outputs != shape_.vocab_size) {
    refuse("the head's shape is not the model's");
  }
  head_ = pack(weights, runtime_->kernels, runtime_->pool, arena_);
}

void Model::set_embedding_int8(const us_weights& weights) {
  if (weights.inputs != shape_.hidden_size || weights.outputs != shape_.vocab_size || !weights.is_plain ||
      weights.row_ids)
    refuse("the embedding must be plain, [vocab_size, hidden_size]");
  embedding_ = {nullptr, Number::kFloat32, pack(weights, runtime_->kernels, runtime_->pool, arena_).view};
}

void Model::set_embedding(const void* values, Number number) {
  embedding_ = {static_cast<const uint8_t*>(values), number, MatrixView()};
}

void Model::share_embedding(const Model& other) {
  if (!other.forward_ || other.shape_.vocab_size != shape_.vocab_size ||
      other.shape_.hidden_size != shape_.hidden_size)
    refuse("the other model is not finished, or of another size");
  embedding_ = other.embedding_;
}

void Model::finish() {
  for (const Layer& layer : layers_) {
    for (int which = 0; which < (is_head() ? kNumLinears : kFc); ++which)
      if (!layer.linear[static_cast<size_t>(which)].view.data) refuse("a linear layer is missing");
    for (int which = 0; which < (shape_.has_qk_norm ? kHiddenNorm : kQNorm); ++which)
      if (layer.norm[static_cast<size_t>(which)].empty()) refuse("a norm is missing");
    if (is_head() && layer.norm[kHiddenNorm].empty()) refuse("a norm is missing");
    const auto& linear = layer.linear;
    if (!linear[kQ].has_inputs_of(linear[kK]) || !linear[kQ].has_inputs_of(linear[kV]) ||
        !linear[kGate].has_inputs_of(linear[kUp]))
      refuse("q, k and v, or gate and up, quantize their inputs differently");
  }
  if (final_norm_.empty() || !head_.view.data) refuse("the final norm or the head is missing");
  if (!embedding_.is_set() && head_ids_.empty()) embedding_.packed = head_.view;
  if (!embedding_.is_set()) refuse("the embedding is missing");
  forward_ = std::make_unique<Forward>(*this);
}

void Model::add_rope(const float* cosine, const float* sine, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t numbers = count * (shape_.head_dim / 2);
  cosine_.insert(cosine_.end(), cosine, cosine + numbers);
  sine_.insert(sine_.end(), sine, sine + numbers);
}

void Model::embed(int32_t token, float* x) const {
  if (!embedding_.values) return runtime_->kernels.embed(embedding_.packed, token, x);
  const size_t size = embedding_.number == Number::kFloat32 ? 4 : 2;
  const size_t row = size * static_cast<size_t>(shape_.hidden_size);
  runtime_->kernels.to_float32(embedding_.values + row * static_cast<size_t>(token), embedding_.number,
                               shape_.hidden_size, x);
}

void Model::check_call(const us_call& call) const {
  if (!forward_) refuse("the model is not finished");
  const auto first = static_cast<int64_t>(call.continues ? rows_.size() : 0);
  if (call.num_rows < 1 || call.num_rows + first > (1 << 24)) refuse("a forward needs 1 to 2^24 rows");
  if (call.features && !is_head()) refuse("only heads read features");
  for (int64_t i = 0; i < call.num_rows; ++i) check_row(call, i, first);
  for (int64_t i = 0; i < call.num_head_rows; ++i)
    if (call.head_rows[i] < 0 || call.head_rows[i] >= call.num_rows) refuse("a head row is not a row of the call");
  for (int64_t i = 0; i < call.num_taps; ++i)
    if (call.tap_layers[i] < (i ? call.tap_layers[i - 1] + 1 : 0) || call.tap_layers[i] > shape_.num_layers)
      refuse("taps must ascend and be layers of the model");
}

// first: rows of earlier calls that this one continues.
void Model::check_row(const us_call& call, int64_t index, int64_t first) const {
  const auto refuse_row = [index](const char* what) { refuse("row " + std::to_string(index) + ": " + what); };
  if (call.tokens[index] < 0 || call.tokens[index] >= shape_.vocab_size) refuse_row("no such token");
  const auto found = sequences_.find(call.sequences[index]);
  const Sequence* sequence = found == sequences_.end() ? nullptr : found->second.get();
  const int32_t parent = call.parents[index];
  int32_t expected = 0;
  if (parent == -1) {
    expected = sequence ? sequence->length() : 0;
  } else if (parent >= 0 && parent < first && sequence && rows_[static_cast<size_t>(parent)].sequence == sequence) {
    expected = rows_[static_cast<size_t>(parent)].position + 1;
  } else if (parent >= first && parent < first + index && call.sequences[parent - first] == call.sequences[index]) {
    expected = call.positions[parent - first] + 1;
  } else {
    refuse_row("the parent is not an earlier row of its sequence");
  }
  if (call.positions[index] != expected) refuse_row("not the next position");
  const auto covered = static_cast<int64_t>(cosine_.size()) / (shape_.head_dim / 2);
  if (call.positions[index] >= covered) refuse_row("no rotary table for its position");
  if (is_head() && !call.features && (parent < 0 || parent >= first))
    refuse_row("without features it must follow a row of an earlier call");
}

// Slots and identity of a row whose position and slot are known.
void Model::place(RowPath& row, const RowPath* parent) const {
  if (parent) row.tail = parent->tail;
  if (row.tail.empty() && row.slot == row.position) {
    row.identity = row.position + 1;
    return;
  }
  row.identity = row.tail.empty() ? row.position : parent->identity;
  row.tail.push_back(row.slot);
}

Sequence& Model::sequence_at(int64_t number) {
  std::unique_ptr<Sequence>& sequence = sequences_[number];
  if (!sequence) {
    const us_shape& s = shape_;
    sequence = std::make_unique<Sequence>(s.num_layers, s.num_kv_heads, s.head_dim, blocks_);
  }
  return *sequence;
}

void Model::lay_out_rows(const us_call& call) {
  if (!call.continues) drop_all_provisional();
  const size_t first = rows_.size(), count = static_cast<size_t>(call.num_rows);
  rows_.resize(first + count);
  row_tokens_.resize(first + count);
  for (size_t i = 0; i < count; ++i) {
    RowPath& row = rows_[first + i];
    row.sequence = &sequence_at(call.sequences[i]);
    row.position = call.positions[i];
    row.slot = row.sequence->add_provisional();
    row_tokens_[first + i] = {call.tokens[i], call.parents[i]};
    place(row, call.parents[i] < 0 ? nullptr : &rows_[static_cast<size_t>(call.parents[i])]);
  }
}

void Model::forward(const us_call& call) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_call(call);
  compute(call);
}

void Model::compute(const us_call& call) {
  lay_out_rows(call);
  forward_->run_call(call);
}

void Model::keep(int64_t sequence, const int32_t* rows, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sequences_.find(sequence);
  if (found != sequences_.end()) return keep_rows(*found->second, rows, count);
  if (count) refuse("keep: no such sequence");
}

void Model::keep_rows(Sequence& sequence, const int32_t* rows, int64_t count) {
  std::vector<int32_t> slots, tokens;
  int32_t parent = -1;
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<size_t>(rows[i]);
    if (rows[i] < 0 || index >= rows_.size() || rows_[index].sequence != &sequence ||
        row_tokens_[index].parent != parent)
      refuse("keep: the rows are not a path of the last calls");
    slots.push_back(rows_[index].slot);
    tokens.push_back(row_tokens_[index].token);
    parent = rows[i];
  }
  sequence.keep(slots, tokens);
  drop_provisional(&sequence);
}

void Model::drop_provisional(Sequence* sequence) {
  sequence->drop_provisional();
  for (RowPath& row : rows_)
    if (row.sequence == sequence) row.sequence = nullptr;
}

void Model::drop_all_provisional() {
  for (const RowPath& row : rows_)
    if (row.sequence) row.sequence->drop_provisional();
  rows_.clear();
  row_tokens_.clear();
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
