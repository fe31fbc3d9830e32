// The linear layers of a forward pass: quantizing what they read, and multiplying tile by tile.
#include <algorithm>
#include <array>

#include "forward.h"

namespace understudy {

namespace {

// Up to this many rows every thread quantizes its own copy of them: cheaper than one more phase.
constexpr int32_t kFewRows = 8;
constexpr int32_t kFetchedRows = 16;  // beyond, computing takes longer than memory

int32_t count_in(const MatrixView& view, int32_t tile) { return std::min(kTile, view.outputs - tile * kTile); }

const float* bias_of(const Matrix& matrix, int32_t tile) {
  return matrix.bias.empty() ? nullptr : matrix.bias.data() + tile * kTile;
}

}  // namespace

// ---- inputs of linear layers --------------------------------------------------------------------------------------

void Forward::add_source(Source source, int32_t layer, int32_t rows) {
  if (rows <= kFewRows) return;
  shared_[source].reserve(rows, columns_of(source, layer));
  add(kPrepare, layer * kNumSources + source, rows);
}

const Matrix& Forward::reader_of(Source source, int32_t layer) const {
  if (source == kHeadNorm) return model_.head_;
  constexpr std::array<Linear, kHeadNorm> kReader = {kFc, kQ, kO, Linear::kGate, Linear::kDown};
  return model_.layers_[static_cast<size_t>(layer)].linear[kReader[source]];
}

bool Forward::wants_tiles(Source source, int32_t layer, int32_t rows) const {
  const auto& linear = model_.layers_[static_cast<size_t>(layer)].linear;
  const auto wants = [&](const Matrix& matrix) { return kernels_.wants_tiles(matrix.view, rows); };
  if (source == kAttentionNorm) return wants(linear[kQ]) && wants(linear[kK]) && wants(linear[kV]);
  if (source == kMlpNorm) return wants(linear[Linear::kGate]) && wants(linear[kUp]);
  return wants(reader_of(source, layer));
}

int32_t Forward::width_of(Source source) const {
  if (source == kAttentionOutput) return num_q_;
  if (source == kHidden) return shape_.intermediate_size;
  if (source == kFeatures) return shape_.num_features * shape_.hidden_size;
  return source == kAttentionNorm && is_head_ ? 2 * shape_.hidden_size : shape_.hidden_size;
}

// Numbers of a row after they are quantized.
int32_t Forward::columns_of(Source source, int32_t layer) const {
  const Matrix& reader = reader_of(source, layer);
  return reader.qmax ? reader.view.inputs : width_of(source);
}

QuantizedInputs Forward::view_of(InputsBuffer& buffer, Source source, int32_t layer) const {
  const int32_t rows = rows_of(source), columns = columns_of(source, layer);
  if (!reader_of(source, layer).qmax) return buffer.in_groups(rows, columns);
  return buffer.by_row(rows, columns, wants_tiles(source, layer, rows));
}

void Forward::quantize_row(Source source, int32_t layer, int32_t row, const QuantizedInputs& to, Scratch& scratch) {
  const auto& norm = model_.layers_[static_cast<size_t>(layer)].norm;
  const float* x = nullptr;
  const float* weight = nullptr;
  switch (source) {
    case kFeatures:
      x = call_->features + static_cast<size_t>(begin_ + row) * static_cast<size_t>(width_of(kFeatures));
      break;
    case kAttentionNorm:
      x = is_head_ ? &joined_[product(row, 2 * shape_.hidden_size)] : residual(row);
      weight = is_head_ ? nullptr : norm[kInputNorm].data();
      break;
    case kAttentionOutput:
      x = &attention_[product(row, num_q_)];
      break;
    case kMlpNorm:
      x = residual(row);
      weight = norm[kPostAttentionNorm].data();
      break;
    case kHidden:
      x = &hidden_rows_[product(row, shape_.intermediate_size)];
      break;
    default:
      x = residual(static_cast<int32_t>(call_->head_rows[head_indices_[static_cast<size_t>(row)]] - begin_));
      weight = model_.final_norm_.data();
  }
  if (!to.is_by_row) return kernels_.quantize(x, weight, shape_.rms_norm_eps, to.in_groups, row, scratch.norm.data());
  kernels_.quantize_row(x, weight, shape_.rms_norm_eps, reader_of(source, layer).grid(), to.by_row, row,
                        scratch.norm.data());
}

QuantizedInputs Forward::inputs_for(Source source, int32_t layer, int32_t thread) {
  const int32_t rows = rows_of(source);
  if (rows > kFewRows) return view_of(shared_[source], source, layer);
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const int64_t wanted = (serial_ * shape_.num_layers + layer) * kNumSources + source;
  if (scratch.prepared == wanted) return view_of(scratch.inputs, source, layer);
  scratch.inputs.reserve(rows, columns_of(source, layer));
  const QuantizedInputs view = view_of(scratch.inputs, source, layer);
  for (int32_t row = 0; row < rows; ++row) quantize_row(source, layer, row, view, scratch);
  scratch.prepared = wanted;
  return view;
}

QuantizedInputs Forward::down_inputs(int32_t layer, int32_t thread) {
  if (reader_of(kHidden, layer).qmax) return inputs_for(kHidden, layer, thread);
  return hidden_.in_groups(num_rows_, shape_.intermediate_size);
}

// ---- linear layers ------------------------------------------------------------------------------------------------

int32_t Forward::items_of(int32_t kind, int32_t layer) const {
  if (kind == kHead) return model_.head_.view.tiles();
  const auto& linear = model_.layers_[static_cast<size_t>(layer)].linear;
  if (kind == kQkv) return linear[kQ].view.tiles() + linear[kK].view.tiles() + linear[kV].view.tiles();
  if (kind == kGateUp) return linear[Linear::kGate].view.tiles();
  if (kind == kFuse) return linear[kFc].view.tiles();
  return linear[kind == kOutput ? kO : Linear::kDown].view.tiles();
}

Forward::Spot Forward::spot(int32_t kind, int32_t layer, int32_t item) const {
  if (kind == kHead) return {&model_.head_, item};
  const auto& linear = model_.layers_[static_cast<size_t>(layer)].linear;
  if (kind == kOutput) return {&linear[kO], item};
  if (kind == kGateUp) return {&linear[Linear::kGate], item};
  if (kind == kFuse) return {&linear[kFc], item};
  if (kind == Kind::kDown) return {&linear[Linear::kDown], item};
  for (const Linear which : {kQ, kK}) {
    const int32_t tiles = linear[which].view.tiles();
    if (item < tiles) return {&linear[which], item};
    item -= tiles;
  }
  return {&linear[kV], item};
}

// Inputs come half from another core: fetched at once, their delays overlap.
void Forward::fetch_inputs(const Phase& phase, int32_t item, int32_t thread, const QuantizedInputs& inputs) const {
  if (inputs.is_by_row) return;
  const Inputs& in = inputs.in_groups;
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
    if (kind == kFuse) {
      kind = kQkv;
    } else if (kind == kQkv) {
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

void Forward::multiply(const Spot& at, const QuantizedInputs& in, Buffer<float>& sums, Scratch& scratch,
                       const uint8_t* next) {
  const MatrixView& view = at.matrix->view;
  if (in.is_by_row) {
    const std::pair<int64_t, int32_t> wanted{serial_, in.by_row.rows};  // the head may have fewer rows than the layers
    if (in.by_row.is_for_tiles && scratch.begun != wanted) {
      kernels_.begin_rows(in.by_row.rows);
      scratch.begun = wanted;
    }
    return kernels_.matmul_tile_rows(view, at.tile, in.by_row, sums.data(), scratch.decode.data(), next);
  }
  kernels_.matmul_tile(view, at.tile, in.in_groups, sums.data(), scratch.decode.data(), next);
}

void Forward::run_fuse(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Spot at = spot(kFuse, phase.layer, item);
  multiply(at, inputs_for(kFeatures, phase.layer, thread), scratch.sums, scratch, next_after(phase, item, thread));
  kernels_.finish_store(scratch.sums.data(), num_rows_, count_in(at.matrix->view, item), nullptr,
                        residual(0) + item * kTile, static_cast<size_t>(shape_.hidden_size));
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

void Forward::run_into_residual(const Phase& phase, int32_t item, int32_t thread, const QuantizedInputs& in) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const Spot at = spot(phase.kind, phase.layer, item);
  fetch_inputs(phase, item, thread, in);
  multiply(at, in, scratch.sums, scratch, next_after(phase, item, thread));
  kernels_.finish_add(scratch.sums.data(), num_rows_, count_in(at.matrix->view, at.tile), bias_of(*at.matrix, at.tile),
                      residual(0) + item * kTile, static_cast<size_t>(shape_.hidden_size));
}

// 32 outputs of gate and up are one group of inputs of the next layer, unless that quantizes whole rows.
void Forward::run_gate_up(const Phase& phase, int32_t item, int32_t thread) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const QuantizedInputs in = inputs_for(kMlpNorm, phase.layer, thread);
  const Matrix& up = model_.layers_[static_cast<size_t>(phase.layer)].linear[kUp];
  multiply(spot(kGateUp, phase.layer, item), in, scratch.sums, scratch, up.view.tile(item));
  multiply({&up, item}, in, scratch.other_sums, scratch, next_after(phase, item, thread));
  if (!reader_of(kHidden, phase.layer).qmax)
    return kernels_.finish_silu(scratch.sums.data(), scratch.other_sums.data(), num_rows_,
                                hidden_.in_groups(num_rows_, shape_.intermediate_size).in_groups, item);
  kernels_.store_silu(scratch.sums.data(), scratch.other_sums.data(), num_rows_,
                      &hidden_rows_[static_cast<size_t>(item) * kTile], static_cast<size_t>(shape_.intermediate_size));
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

}  // namespace understudy
