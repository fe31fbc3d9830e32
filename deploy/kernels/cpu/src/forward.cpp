#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace understudy {

namespace {

constexpr int32_t kMostGroupRows = 8;  // rows whose attention is computed together
constexpr int32_t kHeadRows = 64;  // rows of the head computed together

template <class T>
void grow(Buffer<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
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
      scratch_(static_cast<size_t>(model.runtime_->pool.threads())) {
  for (Scratch& scratch : scratch_) {
    scratch.decode.resize(kDecodeScratch);
    scratch.norm.resize(static_cast<size_t>(std::max(shape_.hidden_size, num_q_)));
    scratch.attention.resize(product(kKeyBlock, 2 * shape_.head_dim + repeat_));
    scratch.output.resize(product(kMostGroupRows * repeat_, shape_.head_dim + 2));
    scratch.sampler = std::make_unique<Sampler>(kernels_);
  }
}

// ---- what runs ----------------------------------------------------------------------------------------------------

void Forward::run_call(const us_call& call) {
  call_ = &call;
  const int64_t most = std::min<int64_t>(kMaxRows, 65535 / shape_.num_kv_heads);
  const int64_t chunks = (call.num_rows + most - 1) / most;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = call.num_rows * i / chunks, end = call.num_rows * (i + 1) / chunks;
    run_layers(call, begin, end);
    std::vector<int64_t> indices;
    for (int64_t j = 0; j < call.num_head_rows; ++j) {
      if (call.head_rows[j] < begin || call.head_rows[j] >= end) continue;
      indices.push_back(j);
      if (indices.size() < kHeadRows) continue;
      run_head(call, indices);
      indices.clear();
    }
    if (!indices.empty()) run_head(call, indices);
  }
}

void Forward::run_layers(const us_call& call, int64_t begin, int64_t end) {
  begin_ = begin;
  num_rows_ = static_cast<int32_t>(end - begin);
  rotates_first_ = false;
  for (int64_t i = begin; i < end; ++i) rotates_first_ |= call.parents[i] >= begin;
  // Rows share work in groups, as long as there is enough for all threads.
  const int32_t enough = 4 * model_.runtime_->pool.threads();
  group_rows_ = std::clamp(num_rows_ * shape_.num_kv_heads / enough, 1, kMostGroupRows);
  num_groups_ = (num_rows_ + group_rows_ - 1) / group_rows_;
  grow(x_, product(num_rows_, shape_.hidden_size));
  grow(qkv_, product(num_rows_, num_q_ + 2 * num_kv_));
  grow(attention_, product(num_rows_, num_q_));
  hidden_.resize(num_rows_, shape_.intermediate_size);
  for (Scratch& scratch : scratch_) {
    grow(scratch.sums, product(num_rows_, kTile));
    grow(scratch.other_sums, product(num_rows_, kTile));
  }
  phases.clear();
  add(kEmbed, 0, num_rows_);
  const int32_t* tap = call.tap_layers;
  const int32_t* last_tap = tap + call.num_taps;
  for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
    if (tap != last_tap && *tap == layer) add(kTap, static_cast<int32_t>(tap++ - call.tap_layers), num_rows_);
    add_layer_phases(layer);
  }
  if (tap != last_tap) add(kTap, static_cast<int32_t>(tap - call.tap_layers), num_rows_);
  ++serial_;
  execute();
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
  add(kDown, layer, items_of(kDown, layer));
}

void Forward::run_head(const us_call& call, const std::vector<int64_t>& indices) {
  head_indices_ = indices;
  num_head_ = static_cast<int32_t>(indices.size());
  const int32_t outputs = model_.head_.view.outputs;
  grow(head_x_, product(num_head_, shape_.hidden_size));
  if (!call.logits) grow(logits_, product(num_head_, outputs));
  logit_rows_.resize(indices.size());
  for (int32_t i = 0; i < num_head_; ++i) {
    const int64_t index = indices[static_cast<size_t>(i)];
    const auto row = static_cast<int32_t>(call.head_rows[index] - begin_);
    const size_t bytes = sizeof(float) * static_cast<size_t>(shape_.hidden_size);
    std::memcpy(&head_x_[product(i, shape_.hidden_size)], residual(row), bytes);
    const size_t place = static_cast<size_t>(index) * static_cast<size_t>(outputs);
    logit_rows_[static_cast<size_t>(i)] = call.logits ? call.logits + place : &logits_[product(i, outputs)];
  }
  for (Scratch& scratch : scratch_) grow(scratch.sums, product(num_head_, kTile));
  phases.clear();
  add_source(kHeadNorm, 0, num_head_);
  add(kHead, 0, items_of(kHead, 0));
  if (call.sampling) add(kChoose, 0, num_head_);
  ++serial_;
  execute();
}

void Forward::execute() {
  model_.runtime_->pool.execute(*this);
  if (!is_timed) return;
  // kTap and kEmbed are "other"; kPrepare and what follows have names of their own, but for rotation, which attends.
  constexpr std::array<int32_t, kChoose + 1> kTimeOf = {0, 0, 1, 2, 3, 3, 4, 5, 5, 6, 7};
  double before = begin;
  for (size_t i = 0; i < phases.size(); before = ends[i++])
    times_[static_cast<size_t>(kTimeOf[static_cast<size_t>(phases[i].kind)])] += ends[i] - before;
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
    case kPrepare: {
      const auto source = static_cast<Source>(layer % kNumSources);
      return quantize_row(source, layer / kNumSources, item, shared_[source].view(), scratch);
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
      return run_into_residual(phase, item, thread, hidden_.view());
    case kHead:
      return run_head_tile(phase, item, thread);
    case kChoose:
      return choose(item, scratch);
  }
}

// ---- sampling -----------------------------------------------------------------------------------------------------

void Forward::choose(int32_t row, Scratch& scratch) {
  const int64_t index = head_indices_[static_cast<size_t>(row)];
  const us_sampling& how = call_->sampling[index];
  const int64_t at = call_->head_rows[index];
  const RowPath& here = model_.rows_[static_cast<size_t>(at)];
  std::vector<int32_t> tokens;
  if (how.repetition_penalty != 1.0) {
    tokens = here.sequence->tokens();
    for (int64_t i = at; i >= 0; i = call_->parents[i]) tokens.push_back(call_->tokens[i]);
  }
  const int64_t* ids = model_.head_ids_.empty() ? nullptr : model_.head_ids_.data();
  call_->chosen[index] = scratch.sampler->choose(logit_rows_[static_cast<size_t>(row)], model_.head_.view.outputs, how,
                                                 tokens, here.position + 1, ids);
}

}  // namespace understudy
