// Drafting: certain tokens are read, then a tree grows level by level, each a forward that continues the last.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "model.h"
#include "tree.h"

namespace understudy {

// The rows of one forward of a draft, and the candidates that it finds.
struct DraftStep {
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

namespace {

void refuse(bool is_wrong, const char* what) {
  if (is_wrong) throw std::invalid_argument(what);
}

std::vector<int32_t> first_rows(int32_t count) {
  std::vector<int32_t> rows(static_cast<size_t>(count));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

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

int64_t Model::draft(const us_draft& draft) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_draft(draft);
  Sequence& sequence = sequence_at(draft.sequence);
  const int32_t length_before = sequence.length();
  DraftStep step;
  Tree tree(draft, runtime_->kernels);
  const int32_t num_certain = read_certain(draft, sequence, step);
  std::vector<int32_t> expanded = {-1};  // the text
  for (;;) {
    if (!step.is_finite(draft.width)) {
      drop_all_provisional();
      sequence.truncate(length_before);
      return -1;
    }
    for (size_t i = 0; i < expanded.size(); ++i) {
      const size_t first = i * static_cast<size_t>(draft.width);
      tree.add_children(expanded[i], &step.candidates[first], &step.scores[first]);
    }
    if (!tree.end_level()) break;
    expanded = tree.expanded();
    expand(draft, tree, num_certain - 1, step);
  }
  keep_rows(sequence, first_rows(num_certain).data(), num_certain);
  drop_all_provisional();
  return tree.write(draft);
}

// Reads the certain tokens, and keeps the rows of all passes but the last. Returns how many rows that one has.
int32_t Model::read_certain(const us_draft& draft, Sequence& sequence, DraftStep& step) {
  const int64_t width = static_cast<int64_t>(shape_.num_features) * shape_.hidden_size;
  for (int64_t begin = 0;;) {
    const auto count = static_cast<int32_t>(std::min<int64_t>(kMaxRows, draft.num_tokens - begin));
    const bool is_last = begin + count == draft.num_tokens;
    step.clear();
    for (int32_t i = 0; i < count; ++i) step.add(draft.tokens[begin + i], sequence.length() + i, i - 1);
    us_call call = step.call(draft, is_last ? 1 : 0);
    if (draft.features) call.features = draft.features + begin * width;
    compute(call);
    if (is_last) return count;
    keep_rows(sequence, first_rows(count).data(), count);
    begin += count;
  }
}

// Computes the nodes that the tree wants expanded. root: the row of the text's last token.
void Model::expand(const us_draft& draft, Tree& tree, int32_t root, DraftStep& step) {
  step.clear();
  auto row = static_cast<int32_t>(rows_.size());
  for (const int32_t index : tree.expanded()) {
    Tree::Node& node = tree.node(index);
    const int32_t parent = node.parent < 0 ? root : tree.node(node.parent).row;
    step.add(node.token, rows_[static_cast<size_t>(parent)].position + 1, parent);
    node.row = row++;
  }
  us_call call = step.call(draft, tree.expanded().size());
  call.continues = 1;
  compute(call);
}

}  // namespace understudy
