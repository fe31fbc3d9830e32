#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace understudy {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPieceBytes = size_t{16} << 20;

}  // namespace

Mapping::Mapping(size_t bytes) : reserved_bytes_(round_up(bytes, kHugePage) + kHugePage), bytes_(bytes) {
  reserved_ = mmap(nullptr, reserved_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(reserved_);
  data_ = static_cast<uint8_t*>(reserved_) + (round_up(address, kHugePage) - address);
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage / 2)  // a page is whole or not there
    madvise(data_, round_up(bytes, kHugePage), MADV_HUGEPAGE);  // only faster: a refusal does not matter
#endif
}

Mapping::~Mapping() { munmap(reserved_, reserved_bytes_); }

uint8_t* Arena::allocate(size_t bytes) {
  bytes = round_up(bytes, 64);
  if (bytes > left_) {
    pieces_.push_back(std::make_unique<Mapping>(round_up(std::max(bytes, kPieceBytes), kHugePage)));
    next_ = pieces_.back()->data();
    left_ = pieces_.back()->bytes();
  }
  uint8_t* result = next_;
  next_ += bytes;
  left_ -= bytes;
  allocated_ += bytes;
  return result;
}

BlockPool::BlockPool(size_t block_bytes)
    : block_bytes_(round_up(std::max<size_t>(block_bytes, 1), 64)),
      num_blocks_(std::clamp<size_t>(kHugePage / block_bytes_, 4, 63)) {}

BlockPool::Block BlockPool::take() {
  const uint64_t full = (uint64_t{1} << num_blocks_) - 1;
  auto piece = std::find_if(pieces_.begin(), pieces_.end(), [&](const auto& each) { return each->taken != full; });
  if (piece == pieces_.end()) {
    pieces_.push_back(std::make_unique<Piece>(num_blocks_ * block_bytes_));
    piece = pieces_.end() - 1;
  }
  size_t index = 0;
  while ((*piece)->taken >> index & 1) ++index;
  (*piece)->taken |= uint64_t{1} << index;
  return Block(reinterpret_cast<uint16_t*>((*piece)->memory.data() + index * block_bytes_), Return{this});
}

void BlockPool::give_back(uint16_t* block) {
  const auto* address = reinterpret_cast<uint8_t*>(block);
  const auto holds = [&](const auto& each) {
    const uint8_t* data = each->memory.data();
    return address >= data && address < data + each->memory.bytes();
  };
  const auto piece = std::find_if(pieces_.begin(), pieces_.end(), holds);
  const auto index = static_cast<size_t>(address - (*piece)->memory.data()) / block_bytes_;
  (*piece)->taken &= ~(uint64_t{1} << index);
  if ((*piece)->taken == 0) pieces_.erase(piece);
}

}  // namespace understudy
