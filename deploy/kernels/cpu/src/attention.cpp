// The attention of a forward pass: rotation, the cache, and the softmax over blocks of keys.
#include <algorithm>
#include <cmath>

#include "forward.h"

namespace understudy {

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
      if (begin == 0 && row > first) fetch_first_block(layer, head, path(row), path(row - 1));
      widen(layer, head, path(row), begin, count, widened, scratch);
      kernels_.attend(attention_block(row, row - first, head, count, scratch));
    }
  }
  for (int32_t row = first; row < last; ++row)
    kernels_.attend_finish(attention_block(row, row - first, head, 0, scratch),
                           &attention_[product(row, num_q_) + product(head * repeat_, shape_.head_dim)]);
}

// The first keys and values of another sequence, which nothing before it has read.
void Forward::fetch_first_block(int32_t layer, int32_t head, const RowPath& at, const RowPath& next) const {
  if (next.sequence == at.sequence || next.identity == 0) return;
  const size_t rows = static_cast<size_t>(std::min(kKeyBlock, next.identity));
  const size_t bytes = rows * static_cast<size_t>(shape_.head_dim) * sizeof(uint16_t);
  const uint16_t* keys = next.sequence->key(layer, head, 0);
  fetch(keys, bytes);
  fetch(keys + next.sequence->value_offset(), bytes);
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
  const bool is_next_known = begin + kKeyBlock < at.identity;
  const uint16_t* next = is_next_known ? at.sequence->key(layer, head, begin + kKeyBlock) : nullptr;
  kernels_.widen(keys, count, dim, next, scratch.attention.data());
  kernels_.widen(values, count, dim, next ? next + value_offset : nullptr, &scratch.attention[product(kKeyBlock, dim)]);
  widened = {is_in_place ? at.sequence : nullptr, count};
}

}  // namespace understudy
