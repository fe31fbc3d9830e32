#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace understudy {

namespace {

// Up to this many rows every thread quantizes its own copy of them: cheaper than one more phase.
constexpr int32_t kFewRows = 8;
constexpr int32_t kFetchedRows = 16;  // beyond, computing takes longer than memory
constexpr int32_t kMostGroupRows = 8;  // rows whose attention is computed together
constexpr int32_t kHeadRows = 64;  // rows of the head computed together

template <class T>
void grow(Buffer<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

void fetch(const void* from, size_t bytes) {
  const auto* line = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

size_t product(int32_t a, int32_t b) { return static_cast<size_t>(a) * static_cast<size_t>(b); }

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

void Forward::add_source(Source source, int32_t layer, int32_t rows) {
  if (rows <= kFewRows) return;
  shared_[source].resize(rows, width_of(source));
  add(kPrepare, layer * kNumSources + source, rows);
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

// ---- inputs of linear layers --------------------------------------------------------------------------------------

int32_t Forward::width_of(Source source) const { return source == kAttentionOutput ? num_q_ : shape_.hidden_size; }

void Forward::quantize_row(Source source, int32_t layer, int32_t row, const Inputs& to, Scratch& scratch) {
  const float eps = shape_.rms_norm_eps;
  const float* x = residual(row);
  const float* weight = nullptr;
  if (source == kAttentionNorm) weight = model_.layers_[static_cast<size_t>(layer)].norm[kInputNorm].data();
  if (source == kMlpNorm) weight = model_.layers_[static_cast<size_t>(layer)].norm[kPostAttentionNorm].data();
  if (source == kAttentionOutput) x = &attention_[product(row, num_q_)];
  if (source == kHeadNorm) {
    x = &head_x_[product(row, shape_.hidden_size)];
    weight = model_.final_norm_.data();
  }
  kernels_.quantize(x, weight, eps, to, row, scratch.norm.data());
}

const Inputs& Forward::inputs_for(Source source, int32_t layer, int32_t thread) {
  const int32_t rows = rows_of(source);
  if (rows > kFewRows) return shared_[source].view();
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const int64_t wanted = (serial_ * shape_.num_layers + layer) * kNumSources + source;
  if (scratch.prepared != wanted) {
    const Inputs& view = scratch.inputs.resize(rows, width_of(source));
    for (int32_t row = 0; row < rows; ++row) quantize_row(source, layer, row, view, scratch);
    scratch.prepared = wanted;
  }
  return scratch.inputs.view();
}

// ---- linear layers ------------------------------------------------------------------------------------------------

int32_t Forward::items_of(int32_t kind, int32_t layer) const {
  if (kind == kHead) return model_.head_.view.tiles();
  const auto& linear = model_.layers_[static_cast<size_t>(layer)].linear;
  if (kind == kQkv) return linear[kQ].view.tiles() + linear[kK].view.tiles() + linear[kV].view.tiles();
  if (kind == kGateUp) return linear[Linear::kGate].view.tiles();
  return linear[kind == kOutput ? kO : Linear::kDown].view.tiles();
}

Forward::Spot Forward::spot(int32_t kind, int32_t layer, int32_t item) const {
  if (kind == kHead) return {&model_.head_, item};
  const auto& linear = model_.layers_[static_cast<size_t>(layer)].linear;
  if (kind == kOutput) return {&linear[kO], item};
  if (kind == kGateUp) return {&linear[Linear::kGate], item};
  if (kind == Kind::kDown) return {&linear[Linear::kDown], item};
  for (const Linear which : {kQ, kK}) {
    const int32_t tiles = linear[which].view.tiles();
    if (item < tiles) return {&linear[which], item};
    item -= tiles;
  }
  return {&linear[kV], item};
}

// Inputs come half from another core: fetched at once, their delays overlap.
void Forward::fetch_inputs(const Phase& phase, int32_t item, int32_t thread, const Inputs& in) const {
  if (in.rows > kFetchedRows || item != model_.runtime_->pool.first_item(phase.items, thread)) return;
  const size_t slots = product(in.rows, in.groups);
  fetch(in.codes, slots * kGroup);
  fetch(in.scale, slots * sizeof(float));
  fetch(in.offset, slots * sizeof(float));
  fetch(in.start, slots * sizeof(int32_t));
}

// Attention leaves memory idle: a slice of the weights that this thread reads next. Slices are numbered by key block.
void Forward::fetch_output_weights(int32_t layer, int32_t thread, int32_t slice, int32_t slices) const {
  if (num_rows_ > kFetchedRows) return;
  const Pool& pool = model_.runtime_->pool;
  const MatrixView& view = model_.layers_[static_cast<size_t>(layer)].linear[kO].view;
  const int32_t first = pool.first_item(view.tiles(), thread), last = pool.first_item(view.tiles(), thread + 1);
  const size_t bytes = view.tile_bytes * static_cast<size_t>(std::max(0, last - first));
  const size_t part = bytes / static_cast<size_t>(slices) / 64 * 64 + 64;
  const size_t begin = part * static_cast<size_t>(slice);
  if (begin < bytes) fetch(view.tile(first) + begin, std::min(part, bytes - begin));
}

// The weights that this thread most likely reads after this item, to be fetched ahead.
const uint8_t* Forward::next_after(const Phase& phase, int32_t item, int32_t thread) const {
  const Pool& pool = model_.runtime_->pool;
  int32_t kind = phase.kind, layer = phase.layer, following = item + 1;
  if (following == phase.items || following == pool.first_item(phase.items, thread + 1)) {
    if (kind == kQkv) {
      kind = kOutput;
    } else if (kind == kOutput) {
      kind = kGateUp;
    } else if (kind == kGateUp) {
      kind = Kind::kDown;
    } else if (kind == Kind::kDown) {
      kind = ++layer < shape_.num_layers ? kQkv : kHead;
    } else {
      kind = kQkv;  // the next call begins there
      layer = 0;
    }
    following = pool.first_item(items_of(kind, layer), thread);
  }
  const Spot at = spot(kind, layer, following);
  return at.matrix->view.tile(at.tile);
}

void Forward::multiply(const Spot& at, const Inputs& in, Buffer<float>& sums, Scratch& scratch,
                       const uint8_t* next) {
  kernels_.matmul_tile(at.matrix->view, at.tile, in, sums.data(), scratch.decode.data(), next);
}

static int32_t count_in(const MatrixView& view, int32_t tile) { return std::min(kTile, view.outputs - tile * kTile); }

static const float* bias_of(const Matrix& matrix, int32_t tile) {
  return matrix.bias.empty() ? nullptr : matrix.bias.data() + tile * kTile;
}

void Forward::run_qkv(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Spot at = spot(kQkv, phase.layer, item);
  multiply(at, inputs_for(kAttentionNorm, phase.layer, thread), scratch.sums, scratch, next_after(phase, item, thread));
  const auto& linear = model_.layers_[static_cast<size_t>(phase.layer)].linear;
  int32_t column = at.tile * kTile;
  if (at.matrix != &linear[kQ]) column += num_q_;
  if (at.matrix == &linear[kV]) column += num_kv_;
  const int32_t count = count_in(at.matrix->view, at.tile);
  kernels_.finish_store(scratch.sums.data(), num_rows_, count, bias_of(*at.matrix, at.tile),
                        &qkv_[static_cast<size_t>(column)], static_cast<size_t>(num_q_ + 2 * num_kv_));
}

void Forward::run_into_residual(const Phase& phase, int32_t item, int32_t thread, const Inputs& in) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Spot at = spot(phase.kind, phase.layer, item);
  fetch_inputs(phase, item, thread, in);
  multiply(at, in, scratch.sums, scratch, next_after(phase, item, thread));
  kernels_.finish_add(scratch.sums.data(), num_rows_, count_in(at.matrix->view, at.tile), bias_of(*at.matrix, at.tile),
                      &x_[product(item, kTile)], static_cast<size_t>(shape_.hidden_size));
}

// 32 outputs of gate and up are one group of inputs of the next layer.
void Forward::run_gate_up(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Inputs& in = inputs_for(kMlpNorm, phase.layer, thread);
  const Matrix& up = model_.layers_[static_cast<size_t>(phase.layer)].linear[kUp];
  multiply(spot(kGateUp, phase.layer, item), in, scratch.sums, scratch, up.view.tile(item));
  multiply({&up, item}, in, scratch.other_sums, scratch, next_after(phase, item, thread));
  kernels_.finish_silu(scratch.sums.data(), scratch.other_sums.data(), num_rows_, hidden_.view(), item);
}

void Forward::run_head_tile(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Spot at = spot(kHead, 0, item);
  multiply(at, inputs_for(kHeadNorm, 0, thread), scratch.sums, scratch, next_after(phase, item, thread));
  const int32_t count = count_in(at.matrix->view, item);
  for (int32_t row = 0; row < num_head_; ++row)
    kernels_.finish_store(&scratch.sums[product(row, kTile)], 1, count, nullptr,
                          logit_rows_[static_cast<size_t>(row)] + product(item, kTile), 0);
}

// ---- attention ----------------------------------------------------------------------------------------------------

// One key/value head of a row: norms and rotation of its queries and key, then key and value into the cache.
void Forward::rotate(int32_t layer, int32_t row, int32_t head) {
  const RowPath& at = path(row);
  const int32_t dim = shape_.head_dim;
  const auto& norm = model_.layers_[static_cast<size_t>(layer)].norm;
  float* line = &qkv_[product(row, num_q_ + 2 * num_kv_)];
  const float* cosine = &model_.cosine_[product(at.position, dim / 2)];
  const float* sine = &model_.sine_[product(at.position, dim / 2)];
  const auto turn = [&](float* x, const Buffer<float>& weight) {
    if (shape_.has_qk_norm) kernels_.rms_norm(x, weight.data(), dim, shape_.rms_norm_eps, x);
    kernels_.rotate(x, cosine, sine, dim);
  };
  for (int32_t i = 0; i < repeat_; ++i) turn(line + (head * repeat_ + i) * dim, norm[kQNorm]);
  float* key = line + num_q_ + head * dim;
  turn(key, norm[kKNorm]);
  uint16_t* slot = at.sequence->key(layer, head, at.slot);
  kernels_.to_half(key, slot, dim);
  kernels_.to_half(line + num_q_ + num_kv_ + head * dim, slot + at.sequence->value_offset(), dim);
}

void Forward::run_attention(int32_t layer, int32_t group, int32_t head, int32_t thread) {
  const int32_t end = std::min((group + 1) * group_rows_, num_rows_);
  for (int32_t row = group * group_rows_; row < end && !rotates_first_; ++row) rotate(layer, row, head);
  attend(layer, group, head, thread);
}

// One key/value head of some rows. Rows of one sequence share the work of reading its cache.
void Forward::attend(int32_t layer, int32_t group, int32_t head, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const int32_t first = group * group_rows_, last = std::min(first + group_rows_, num_rows_);
  int32_t longest = 0;
  for (int32_t row = first; row < last; ++row) {
    longest = std::max(longest, path(row).position + 1);
    float* state = state_of(scratch, row - first);
    std::fill(state, state + repeat_ * (shape_.head_dim + 1), 0.0f);
    std::fill(state + repeat_ * (shape_.head_dim + 1), state + repeat_ * (shape_.head_dim + 2), -INFINITY);
  }
  const int32_t blocks = (longest + kKeyBlock - 1) / kKeyBlock, items = num_groups_ * shape_.num_kv_heads;
  const int32_t own = std::max(1, items / model_.runtime_->pool.threads());
  const int32_t first_slice = (head * num_groups_ + group) % own * blocks;
  for (int32_t begin = 0; begin < longest; begin += kKeyBlock) {
    fetch_output_weights(layer, thread, first_slice + begin / kKeyBlock, own * blocks);
    Widened widened = {nullptr, 0};
    for (int32_t row = last - 1; row >= first; --row) {
      const int32_t count = std::min(kKeyBlock, path(row).position + 1 - begin);
      if (count <= 0) continue;
      widen(layer, head, path(row), begin, count, widened, scratch);
      kernels_.attend(attention_block(row, row - first, head, count, scratch));
    }
  }
  for (int32_t row = first; row < last; ++row)
    kernels_.attend_finish(attention_block(row, row - first, head, 0, scratch),
                           &attention_[product(row, num_q_) + product(head * repeat_, shape_.head_dim)]);
}

// Outputs, totals and maxima of one row's query heads.
float* Forward::state_of(Scratch& scratch, int32_t index) const {
  return &scratch.output[product(index, repeat_ * (shape_.head_dim + 2))];
}

AttentionBlock Forward::attention_block(int32_t row, int32_t index, int32_t head, int32_t count,
                                        Scratch& scratch) const {
  const int32_t dim = shape_.head_dim;
  float* output = state_of(scratch, index);
  float *total = output + repeat_ * dim, *keys = scratch.attention.data(), *values = keys + kKeyBlock * dim;
  const float* q = &qkv_[product(row, num_q_ + 2 * num_kv_) + product(head * repeat_, dim)];
  return {q, repeat_, dim, count, score_scale_, keys, values, total + repeat_, total, output, values + kKeyBlock * dim};
}

// Keys and values of positions [begin, begin + count) of a path as floats, unless they are there already.
void Forward::widen(int32_t layer, int32_t head, const RowPath& at, int32_t begin, int32_t count, Widened& widened,
                    Scratch& scratch) {
  const bool is_in_place = begin + count <= at.identity;
  if (is_in_place && widened.sequence == at.sequence && widened.count >= count) return;
  const int32_t dim = shape_.head_dim;
  const size_t value_offset = at.sequence->value_offset();
  const uint16_t *keys[kKeyBlock], *values[kKeyBlock];
  const uint16_t* first = is_in_place ? at.sequence->key(layer, head, begin) : nullptr;
  for (int32_t i = 0; i < count; ++i) {
    keys[i] = is_in_place ? first + product(i, dim) : at.sequence->key(layer, head, at.slot_at(begin + i));
    values[i] = keys[i] + value_offset;
  }
  const bool is_next_known = begin + 2 * kKeyBlock <= at.identity;
  const uint16_t* next = is_next_known ? at.sequence->key(layer, head, begin + kKeyBlock) : nullptr;
  kernels_.widen(keys, count, dim, next, scratch.attention.data());
  kernels_.widen(values, count, dim, next ? next + value_offset : nullptr, &scratch.attention[product(kKeyBlock, dim)]);
  widened = {is_in_place ? at.sequence : nullptr, count};
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
