#include "tree.h"

#include <algorithm>

namespace understudy {

void Tree::add_children(int32_t parent, const int64_t* tokens, const float* scores) {
  for (int32_t i = 0; i < limits_.width && tokens[i] >= 0; ++i) {
    Node child = {static_cast<int32_t>(tokens[i]), parent, level_, scores[i], 0.0f, -1};
    if (parent >= 0) child.score = node(parent).score + scores[i];
    kernels_.exp_difference(&child.score, 0.0f, 1, &child.probability);
    if (static_cast<double>(child.probability) < limits_.min_probability) return;  // as are those behind it
    nodes_.push_back(child);
  }
}

void Tree::keep_best() {
  for (size_t i = level_begin_; i < nodes_.size(); ++i) kept_.push_back(static_cast<int32_t>(i));
  const auto most = std::min(kept_.size(), static_cast<size_t>(limits_.num_nodes));
  const auto comes_before = [this](int32_t a, int32_t b) {
    const float x = node(a).score, y = node(b).score;
    return x > y || (x == y && a < b);
  };
  std::partial_sort(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(most), kept_.end(), comes_before);
  kept_.resize(most);
}

bool Tree::end_level() {
  keep_best();
  double sum = 0.0;
  expanded_.clear();
  for (const int32_t index : kept_) {
    const Node& kept = node(index);
    sum += static_cast<double>(kept.probability);
    // What is not kept has no descendants that are.
    if (kept.level == level_ && static_cast<int32_t>(expanded_.size()) < limits_.width) expanded_.push_back(index);
  }
  const double gain = sum - expected_;
  expected_ = sum;
  level_begin_ = nodes_.size();
  return level_++ < limits_.depth && gain > limits_.min_gain && !expanded_.empty();
}

// A parent ranks before its children: none is likelier, and they came later.
int64_t Tree::write(const us_draft& to) const {
  std::vector<int32_t> place(nodes_.size(), -1);
  for (size_t i = 0; i < kept_.size(); ++i) {
    const Node& from = nodes_[static_cast<size_t>(kept_[i])];
    place[static_cast<size_t>(kept_[i])] = static_cast<int32_t>(i);
    to.drafted[i] = from.token;
    to.parents[i] = from.parent < 0 ? -1 : place[static_cast<size_t>(from.parent)];
    to.scores[i] = from.score;
  }
  return static_cast<int64_t>(kept_.size());
}

}  // namespace understudy
