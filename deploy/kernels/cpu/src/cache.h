// Keys and values per sequence: kept tokens in position order, then the provisional rows of the last calls.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "buffer.h"
#include "memory.h"

namespace understudy {

// One sequence. Its memory grows by blocks of 64 tokens, which never move. In a block every layer and key/value head
// has its 64 keys [64][head_dim] and then its 64 values, in fp16.
class Sequence {
 public:
  static constexpr int32_t kBlockTokens = 64;

  // pool: of blocks of `block_bytes`.
  Sequence(int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, BlockPool& pool)
      : num_layers_(num_layers), num_kv_heads_(num_kv_heads), head_dim_(head_dim), pool_(pool) {}

  static size_t block_bytes(int32_t num_layers, int32_t num_kv_heads, int32_t head_dim) {
    return product(num_layers, num_kv_heads) * product(2 * kBlockTokens, head_dim) * sizeof(uint16_t);
  }

  int32_t length() const { return length_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  size_t bytes() const { return blocks_.size() * pool_.block_bytes(); }

  uint16_t* key(int32_t layer, int32_t head, int32_t slot) {
    const size_t part = static_cast<size_t>(layer * num_kv_heads_ + head) * 2 * kBlockTokens;
    return blocks_[static_cast<size_t>(slot / kBlockTokens)].get() +
           (part + static_cast<size_t>(slot % kBlockTokens)) * static_cast<size_t>(head_dim_);
  }
  // A slot's value lies this many halves behind its key.
  size_t value_offset() const { return static_cast<size_t>(kBlockTokens) * static_cast<size_t>(head_dim_); }

  // The slot of one more provisional row.
  int32_t add_provisional() {
    const int32_t slot = length_ + num_provisional_++;
    if (static_cast<size_t>(slot / kBlockTokens) == blocks_.size()) blocks_.push_back(pool_.take());
    return slot;
  }
  void drop_provisional() { num_provisional_ = 0; }

  void truncate(int32_t length) {
    length_ = length;
    tokens_.resize(static_cast<size_t>(length));
    drop_provisional();
  }

  // Appends the rows in `slots` (ascending, provisional) with their tokens, and drops the others.
  void keep(const std::vector<int32_t>& slots, const std::vector<int32_t>& tokens);

 private:
  void move(int32_t from, int32_t to);

  int32_t num_layers_, num_kv_heads_, head_dim_;
  BlockPool& pool_;
  int32_t length_ = 0, num_provisional_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<BlockPool::Block> blocks_;
};

// A provisional row: where its path lies. Positions below `identity` are in the slot of their own number; those from
// `identity` on are in the slots that `tail` lists.
struct RowPath {
  Sequence* sequence = nullptr;
  int32_t position = 0, slot = 0, identity = 0;
  std::vector<int32_t> tail;

  int32_t slot_at(int32_t p) const { return p < identity ? p : tail[static_cast<size_t>(p - identity)]; }
};

}  // namespace understudy
