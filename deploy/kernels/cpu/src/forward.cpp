#include "forward.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

#include "rounding.h"

namespace understudy {

namespace {

constexpr int32_t kMostGroupRows = 8;  // rows whose attention is computed together
constexpr int32_t kHeadRows = 64;  // rows of the head computed together

template <class T>
void grow(Buffer<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

// Rows of one sequence share the reading of its cache, which costs about as much as one row's attention; too large a
// group leaves threads idle. So: the size whose slowest thread has least to do.
int32_t choose_group_rows(int32_t rows, int32_t heads, int32_t threads) {
  int32_t best = 1, least = std::numeric_limits<int32_t>::max();
  for (int32_t size = 1; size <= std::min(rows, kMostGroupRows); ++size) {
    const int32_t items = (rows + size - 1) / size * heads;
    const int32_t longest = (items + threads - 1) / threads * (size + 1);
    if (longest > least) continue;
    best = size;
    least = longest;
  }
  return best;
}

}  // namespace

Forward::Forward(Model& model)
    : model_(model),
      shape_(model.shape_),
      kernels_(model.runtime_->kernels),
      num_q_(shape_.num_heads * shape_.head_dim),
      num_kv_(shape_.num_kv_heads * shape_.head_dim),
      repeat_(shape_.num_heads / shape_.num_kv_heads),
      score_scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape_.head_dim)))),
      is_head_(model.is_head()),
      scratch_(static_cast<size_t>(model.runtime_->pool.threads())) {
  for (const Layer& layer : model.layers_) hidden_by_row_ |= layer.linear[Linear::kDown].qmax != 0;
  for (Scratch& scratch : scratch_) {
    scratch.decode.resize(kDecodeScratch);
    scratch.norm.resize(static_cast<size_t>(std::max({shape_.hidden_size, num_q_, shape_.intermediate_size})));
    scratch.attention.resize(product(kKeyBlock, 2 * shape_.head_dim + repeat_));
    scratch.output.resize(product(kMostGroupRows * repeat_, shape_.head_dim + 2));
    scratch.sampler = std::make_unique<Sampler>(kernels_);
  }
}

// ---- what runs ----------------------------------------------------------------------------------------------------

void Forward::run_call(const us_call& call) {
  call_ = &call;
  first_ = static_cast<int64_t>(model_.rows_.size()) - call.num_rows;
  const int64_t most = std::min<int64_t>(kMaxRows, 65535 / shape_.num_kv_heads);
  const int64_t chunks = (call.num_rows + most - 1) / most;
  for (int64_t i = 0; i < chunks; ++i) run_rows(call.num_rows * i / chunks, call.num_rows * (i + 1) / chunks);
}

// Layers and, as far as it goes, the head in one program; more rows of the head than it takes in further ones.
void Forward::run_rows(int64_t begin, int64_t end) {
  std::vector<int64_t> head_rows;
  for (int64_t i = 0; i < call_->num_head_rows; ++i)
    if (call_->head_rows[i] >= begin && call_->head_rows[i] < end) head_rows.push_back(i);
  begin_rows(begin, end);
  size_t done = 0;
  do {
    begin_head(head_rows, done);
    execute();
    done += head_indices_.size();
    phases.clear();
  } while (done < head_rows.size());
}

void Forward::begin_rows(int64_t begin, int64_t end) {
  begin_ = begin;
  num_rows_ = static_cast<int32_t>(end - begin);
  rotates_first_ = false;
  for (int64_t i = begin; i < end; ++i) rotates_first_ |= call_->parents[i] >= first_ + begin;
  group_rows_ = choose_group_rows(num_rows_, shape_.num_kv_heads, model_.runtime_->pool.threads());
  num_groups_ = (num_rows_ + group_rows_ - 1) / group_rows_;
  grow(x_, static_cast<size_t>(is_head_ ? first_ + end : end - begin) * static_cast<size_t>(shape_.hidden_size));
  grow(qkv_, product(num_rows_, num_q_ + 2 * num_kv_));
  grow(attention_, product(num_rows_, num_q_));
  if (is_head_) grow(joined_, product(num_rows_, 2 * shape_.hidden_size));
  hidden_.reserve(num_rows_, shape_.intermediate_size);
  if (hidden_by_row_) grow(hidden_rows_, product(num_rows_, shape_.intermediate_size));
  for (Scratch& scratch : scratch_) {
    grow(scratch.sums, product(num_rows_ + kRowsBehind, kTile));
    grow(scratch.other_sums, product(num_rows_ + kRowsBehind, kTile));
  }
  phases.clear();
  add_input_phases();
  const int32_t* tap = call_->tap_layers;
  const int32_t* last_tap = tap + call_->num_taps;
  for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
    if (tap != last_tap && *tap == layer) add(kTap, static_cast<int32_t>(tap++ - call_->tap_layers), num_rows_);
    add_layer_phases(layer);
  }
  if (tap != last_tap) add(kTap, static_cast<int32_t>(tap - call_->tap_layers), num_rows_);
}

void Forward::add_input_phases() {
  if (!is_head_) return add(kEmbed, 0, num_rows_);
  if (call_->features) {
    add_source(kFeatures, 0, num_rows_);
    add(kFuse, 0, items_of(kFuse, 0));
  }
  add(kJoin, 0, num_rows_);
}

void Forward::add_layer_phases(int32_t layer) {
  add_source(kAttentionNorm, layer, num_rows_);
  add(kQkv, layer, items_of(kQkv, layer));
  const int32_t heads = num_rows_ * shape_.num_kv_heads;
  if (rotates_first_) add(kRotate, layer, heads);
  add(kAttend, layer, num_groups_ * shape_.num_kv_heads);
  add_source(kAttentionOutput, layer, num_rows_);
  add(kOutput, layer, items_of(kOutput, layer));
  add_source(kMlpNorm, layer, num_rows_);
  add(kGateUp, layer, items_of(kGateUp, layer));
  if (reader_of(kHidden, layer).qmax) add_source(kHidden, layer, num_rows_);
  add(kDown, layer, items_of(kDown, layer));
}

// The head for some of the rows that have just run: `head_rows` from number `first` on, as many as it takes.
void Forward::begin_head(const std::vector<int64_t>& head_rows, size_t first) {
  const size_t count = std::min(head_rows.size() - first, size_t{kHeadRows});
  head_indices_.assign(head_rows.begin() + static_cast<std::ptrdiff_t>(first),
                       head_rows.begin() + static_cast<std::ptrdiff_t>(first + count));
  num_head_ = static_cast<int32_t>(count);
  if (num_head_ == 0) return;
  const int32_t outputs = model_.head_.view.outputs;
  if (!call_->logits) grow(logits_, product(num_head_, outputs));
  logit_rows_.resize(count);
  for (int32_t i = 0; i < num_head_; ++i) {
    const int64_t index = head_indices_[static_cast<size_t>(i)];
    const size_t place = static_cast<size_t>(index) * static_cast<size_t>(outputs);
    logit_rows_[static_cast<size_t>(i)] = call_->logits ? call_->logits + place : &logits_[product(i, outputs)];
  }
  for (Scratch& scratch : scratch_) grow(scratch.sums, product(num_head_, kTile));
  add_source(kHeadNorm, 0, num_head_);
  add(kHead, 0, items_of(kHead, 0));
  if (call_->sampling && num_head_ > 1) add(kChoose, 0, num_head_);
}

void Forward::execute() {
  ++serial_;
  model_.runtime_->pool.execute(*this);
  if (is_timed) {
    // kTap, kEmbed and kJoin are "other"; rotation belongs to attention, and fusing features to q, k and v.
    constexpr std::array<int32_t, kChoose + 1> kTimeOf = {0, 0, 2, 0, 1, 2, 3, 3, 4, 5, 5, 6, 7};
    double before = begin;
    for (size_t i = 0; i < phases.size(); before = ends[i++])
      times_[static_cast<size_t>(kTimeOf[static_cast<size_t>(phases[i].kind)])] += ends[i] - before;
  }
  if (call_->sampling && num_head_ == 1) choose_alone();
}

// A single row chooses without the others: they would only wait.
void Forward::choose_alone() {
  const DefaultRounding rounding;
  const auto before = std::chrono::steady_clock::now();
  choose(0, scratch_[0]);
  if (is_timed) times_.back() += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

void Forward::time_phases(bool is_wanted) {
  is_timed = is_wanted;
  times_.fill(0.0);
}

void Forward::run(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const int32_t layer = phase.layer;
  switch (static_cast<Kind>(phase.kind)) {
    case kTap: {
      const size_t row = static_cast<size_t>(layer * call_->num_rows + begin_ + item);
      std::memcpy(call_->taps + row * static_cast<size_t>(shape_.hidden_size), residual(item),
                  sizeof(float) * static_cast<size_t>(shape_.hidden_size));
      return;
    }
    case kEmbed:
      return model_.embed(call_->tokens[begin_ + item], residual(item));
    case kFuse:
      return run_fuse(phase, item, thread);
    case kJoin:
      return join(item, scratch);
    case kPrepare: {
      const auto source = static_cast<Source>(layer % kNumSources);
      const int32_t reader = layer / kNumSources;
      return quantize_row(source, reader, item, view_of(shared_[source], source, reader), scratch);
    }
    case kQkv:
      return run_qkv(phase, item, thread);
    case kRotate:
      return rotate(layer, item % num_rows_, item / num_rows_);
    case kAttend:
      return run_attention(layer, item % num_groups_, item / num_groups_, thread);
    case kOutput:
      return run_into_residual(phase, item, thread, inputs_for(kAttentionOutput, layer, thread));
    case kGateUp:
      return run_gate_up(phase, item, thread);
    case kDown:
      return run_into_residual(phase, item, thread, down_inputs(layer, thread));
    case kHead:
      return run_head_tile(phase, item, thread);
    case kChoose:
      return choose(item, scratch);
  }
}

// What the layer of a head reads: the token's embedding beside the state that its features or its parent give.
void Forward::join(int32_t row, Scratch& scratch) {
  const int32_t hidden = shape_.hidden_size;
  const size_t bytes = sizeof(float) * static_cast<size_t>(hidden);
  const auto& norm = model_.layers_[0].norm;
  float *x = residual(row), *joined = &joined_[product(row, 2 * hidden)];
  if (!call_->features) std::memcpy(x, state(call_->parents[begin_ + row]), bytes);
  model_.embed(call_->tokens[begin_ + row], scratch.norm.data());
  kernels_.rms_norm(scratch.norm.data(), norm[kInputNorm].data(), hidden, shape_.rms_norm_eps, joined);
  kernels_.rms_norm(x, norm[kHiddenNorm].data(), hidden, shape_.rms_norm_eps, joined + hidden);
  if (shape_.norm_before_residual) std::memcpy(x, joined + hidden, bytes);
}

// ---- sampling -----------------------------------------------------------------------------------------------------

void Forward::choose(int32_t row, Scratch& scratch) {
  const int64_t index = head_indices_[static_cast<size_t>(row)];
  const us_sampling& how = call_->sampling[index];
  int64_t at = first_ + call_->head_rows[index];
  const RowPath& here = model_.rows_[static_cast<size_t>(at)];
  std::vector<int32_t> tokens;
  if (how.repetition_penalty != 1.0) {
    tokens = here.sequence->tokens();
    for (; at >= 0; at = model_.row_tokens_[static_cast<size_t>(at)].parent)
      tokens.push_back(model_.row_tokens_[static_cast<size_t>(at)].token);
  }
  const int64_t* ids = model_.head_ids_.empty() ? nullptr : model_.head_ids_.data();
  const float* logits = logit_rows_[static_cast<size_t>(row)];
  const int32_t outputs = model_.head_.view.outputs;
  // A head's row reads the token behind its position.
  const int64_t position = here.position + (is_head_ ? 2 : 1);
  if (call_->chosen) call_->chosen[index] = scratch.sampler->choose(logits, outputs, how, tokens, position, ids);
  const int32_t most = call_->num_candidates;
  if (most == 0) return;
  int64_t* found = call_->candidates + index * most;
  float* scores = call_->scores ? call_->scores + index * most : nullptr;
  const int32_t count = scratch.sampler->candidates(logits, outputs, how, tokens, position, ids, most, found, scores);
  std::fill(found + count, found + most, int64_t{-1});
}

}  // namespace understudy
