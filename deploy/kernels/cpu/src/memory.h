// Memory that is read at the speed of the machine: on huge pages, where the system has them. With small ones every
// 4 kB of weights, keys or values cost a walk through the page tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace understudy {

inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Zeros from the system, at the start of a huge page. Throws std::bad_alloc.
class Mapping {
 public:
  explicit Mapping(size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* reserved_;
  size_t reserved_bytes_, bytes_;
  uint8_t* data_;
};

// Memory for packed weights in large pieces that live as long as the arena.
class Arena {
 public:
  uint8_t* allocate(size_t bytes);
  size_t allocated() const { return allocated_; }

 private:
  std::vector<std::unique_ptr<Mapping>> pieces_;
  size_t left_ = 0, allocated_ = 0;
  uint8_t* next_ = nullptr;
};

// Blocks of one size, some to a mapping, which goes back to the system with the last of them. What a block holds at
// first is not defined. The pool outlives its blocks.
class BlockPool {
 public:
  explicit BlockPool(size_t block_bytes);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  struct Return {
    BlockPool* pool;
    void operator()(uint16_t* block) const { pool->give_back(block); }
  };
  using Block = std::unique_ptr<uint16_t, Return>;
  Block take();
  size_t block_bytes() const { return block_bytes_; }

 private:
  struct Piece {
    explicit Piece(size_t bytes) : memory(bytes) {}
    Mapping memory;
    uint64_t taken = 0;  // a bit for each block
  };
  void give_back(uint16_t* block);

  size_t block_bytes_, num_blocks_;  // of a piece
  std::vector<std::unique_ptr<Piece>> pieces_;
};

}  // namespace understudy
