// How a draft grows: docs/numerics.md, and TreeLimits in deploy/runtime/tree.py. Knows nothing of models.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "understudy_cpu.h"

namespace understudy {

class Tree {
 public:
  struct Node {
    int32_t token, parent, level;
    float score;        // logarithm of the path's probability
    float probability;  // of the path
    int32_t row;        // that computed it, where it was expanded
  };

  Tree(const us_draft& limits, const Kernels& kernels) : limits_(limits), kernels_(kernels) {}

  // The candidates that follow `parent` (-1: the text), best first; tokens below 0 are none.
  void add_children(int32_t parent, const int64_t* tokens, const float* scores);
  // Ends a level. Returns whether another one is to be computed, of the nodes in `expanded()`.
  bool end_level();
  const std::vector<int32_t>& expanded() const { return expanded_; }
  Node& node(int32_t index) { return nodes_[static_cast<size_t>(index)]; }
  // Writes the kept nodes, best first, and returns how many there are.
  int64_t write(const us_draft& to) const;

 private:
  void keep_best();

  const us_draft& limits_;
  const Kernels& kernels_;
  std::vector<Node> nodes_;
  std::vector<int32_t> kept_, expanded_;  // kept_: best first
  int32_t level_ = 1;
  size_t level_begin_ = 0;
  double expected_ = 0.0;  // sum of the kept nodes' probabilities
};

}  // namespace understudy
