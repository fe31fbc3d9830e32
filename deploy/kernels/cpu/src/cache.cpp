#include "cache.h"

#include <cstring>

namespace understudy {

void Sequence::move(int32_t from, int32_t to) {
  const size_t bytes = static_cast<size_t>(head_dim_) * sizeof(uint16_t);
  for (int32_t layer = 0; layer < num_layers_; ++layer)
    for (int32_t head = 0; head < num_kv_heads_; ++head) {
      const uint16_t* source = key(layer, head, from);
      uint16_t* target = key(layer, head, to);
      std::memcpy(target, source, bytes);
      std::memcpy(target + value_offset(), source + value_offset(), bytes);
    }
}

// Slots ascend and each lies at or behind its target, so no row is overwritten before it has moved.
void Sequence::keep(const std::vector<int32_t>& slots, const std::vector<int32_t>& tokens) {
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] != length_) move(slots[i], length_);
    tokens_.push_back(tokens[i]);
    ++length_;
  }
  drop_provisional();
}

}  // namespace understudy
