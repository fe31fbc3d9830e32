// Drafting: certain tokens are read, then a tree grows level by level, each a forward that continues the last.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "model.h"
#include "tree.h"

namespace understudy {

namespace {

void refuse(bool is_wrong, const char* what) {
  if (is_wrong) throw std::invalid_argument(what);
}

// The rows of one forward of a draft, and the candidates that it finds.
struct Step {
  std::vector<int32_t> tokens, positions, parents;
  std::vector<int64_t> sequences, head_rows, candidates;
  std::vector<float> scores;
  std::vector<us_sampling> sampling;

  void clear() {
    tokens.clear();
    positions.clear();
    parents.clear();
  }

  void add(int32_t token, int32_t position, int32_t parent) {
    tokens.push_back(token);
    positions.push_back(position);
    parents.push_back(parent);
  }

  // The call of these rows; the last `num_heads` of them find candidates.
  us_call call(const us_draft& draft, size_t num_heads) {
    const size_t count = tokens.size();
    sequences.assign(count, draft.sequence);
    head_rows.resize(num_heads);
    std::iota(head_rows.begin(), head_rows.end(), static_cast<int64_t>(count - num_heads));
    sampling.assign(num_heads, *draft.sampling);
    candidates.resize(num_heads * static_cast<size_t>(draft.width));
    scores.resize(candidates.size());
    us_call made = {};
    made.num_rows = static_cast<int64_t>(count);
    made.tokens = tokens.data();
    made.positions = positions.data();
    made.parents = parents.data();
    made.sequences = sequences.data();
    made.num_head_rows = static_cast<int64_t>(num_heads);
    made.head_rows = head_rows.data();
    if (num_heads == 0) return made;
    made.sampling = sampling.data();
    made.num_candidates = draft.width;
    made.candidates = candidates.data();
    made.scores = scores.data();
    return made;
  }

  // Whether every row found any: none does where a logit is not finite.
  bool is_finite(int32_t width) const {
    for (size_t i = 0; i < candidates.size(); i += static_cast<size_t>(width))
      if (candidates[i] < 0) return false;
    return true;
  }
};

}  // namespace

void Model::check_draft(const us_draft& draft) const {
  refuse(!forward_, "the model is not finished");
  refuse(draft.num_tokens < 1 || draft.num_tokens > (1 << 24), "a draft needs 1 to 2^24 tokens");
  refuse(draft.depth < 1 || draft.depth > US_MOST_NODES || draft.width < 1 || draft.width > US_MOST_WIDTH ||
             draft.num_nodes < 1 || draft.num_nodes > US_MOST_NODES,
         "the draft's limits are out of range");
  refuse((draft.features != nullptr) != is_head(), "heads read features, and only they");
  for (int64_t i = 0; i < draft.num_tokens; ++i)
    refuse(draft.tokens[i] < 0 || draft.tokens[i] >= shape_.vocab_size, "no such token");
  const auto found = sequences_.find(draft.sequence);
  const int64_t kept = found == sequences_.end() ? 0 : found->second->length();
  const auto covered = static_cast<int64_t>(cosine_.size()) / (shape_.head_dim / 2);
  refuse(kept + draft.num_tokens + draft.depth - 1 > covered, "no rotary table for all positions");
}

// Reads the certain tokens and keeps all but the last pass's rows. Returns how many those are.
int64_t Model::draft(const us_draft& draft) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_draft(draft);
  Sequence& sequence = sequence_at(draft.sequence);
  const int32_t length_before = sequence.length();
  const size_t width_of_features = static_cast<size_t>(shape_.num_features) * static_cast<size_t>(shape_.hidden_size);
  Step step;
  std::vector<int32_t> certain;
  for (int64_t begin = 0; begin < draft.num_tokens;) {
    const int64_t end = std::min<int64_t>(begin + kMaxRows, draft.num_tokens);
    step.clear();
    for (int64_t i = begin; i < end; ++i)
      step.add(draft.tokens[i], length_before + static_cast<int32_t>(i), static_cast<int32_t>(i - begin) - 1);
    const bool is_last = end == draft.num_tokens;
    us_call call = step.call(draft, is_last ? 1 : 0);
    if (draft.features) call.features = draft.features + static_cast<size_t>(begin) * width_of_features;
    compute(call);
    certain.resize(static_cast<size_t>(end - begin));
    std::iota(certain.begin(), certain.end(), 0);
    if (!is_last) keep_rows(sequence, certain.data(), end - begin);
    begin = end;
  }
  Tree tree(draft, runtime_->kernels);
  const auto root = static_cast<int32_t>(certain.size()) - 1;
  std::vector<int32_t> expanded = {-1};
  for (;;) {
    if (!step.is_finite(draft.width)) {
      sequence.truncate(length_before);
      drop_all_provisional();
      return -1;
    }
    for (size_t i = 0; i < expanded.size(); ++i) {
      const size_t first = i * static_cast<size_t>(draft.width);
      tree.add_children(expanded[i], &step.candidates[first], &step.scores[first]);
    }
    if (!tree.end_level()) break;
    expanded = tree.expanded();
    step.clear();
    const auto first_row = static_cast<int32_t>(rows_.size());
    for (size_t i = 0; i < expanded.size(); ++i) {
      Tree::Node& node = tree.node(expanded[i]);
      const int32_t parent = node.parent < 0 ? root : tree.node(node.parent).row;
      node.row = first_row + static_cast<int32_t>(i);
      step.add(node.token, rows_[static_cast<size_t>(parent)].position + 1, parent);
    }
    us_call call = step.call(draft, expanded.size());
    call.continues = 1;
    compute(call);
  }
  keep_rows(sequence, certain.data(), static_cast<int64_t>(certain.size()));
  drop_all_provisional();
  return tree.write(draft);
}

}  // namespace understudy
