// The best tokens of a row and what they are worth: the candidates of docs/numerics.md.
#include <algorithm>
#include <limits>
#include <numeric>

#include "sampling.h"

namespace understudy {

int32_t Sampler::candidates(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
                            int64_t position, const int64_t* ids, int32_t count, int64_t* tokens, float* scores) {
  if (!begin(logits, n, how, path, ids)) return 0;
  const float* values = z_;
  int32_t num_values = n;
  float largest = largest_;
  const bool is_sampled = how.temperature != 0;
  if (is_sampled) {
    truncate(how);
    if (keeps_all_) {
      kept_.resize(static_cast<size_t>(n));
      std::iota(kept_.begin(), kept_.end(), 0);
    }
    if (!std::is_sorted(kept_.begin(), kept_.end())) std::sort(kept_.begin(), kept_.end());
    add_noise(kept_, how, position);
    values = noisy_.data();
    num_values = static_cast<int32_t>(kept_.size());
    largest = kernels_.find_maximum(values, num_values).maximum;
  }
  count = std::min(count, num_values);
  find_best(values, num_values, largest, count);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t best = best_of_[static_cast<size_t>(i)];
    tokens[i] = id_of(is_sampled ? kept_[static_cast<size_t>(best)] : best);
  }
  if (!scores) return count;
  const float total = kernels_.log(static_cast<float>(kernels_.sum_exp(values, largest, num_values)));
  for (int32_t i = 0; i < count; ++i) scores[i] = (values[best_of_[static_cast<size_t>(i)]] - largest) - total;
  return count;
}

// best_of_ becomes the indices of the `count` largest values, largest first, ties by index.
void Sampler::find_best(const float* values, int32_t n, float largest, int32_t count) {
  float depth = count == 1 ? 0.0f : 4.0f;
  int32_t found = find_above(values, largest - depth, n);
  while (found < count) {
    depth = depth > 1e3f ? std::numeric_limits<float>::infinity() : depth * 2;
    found = find_above(values, largest - depth, n);
  }
  best_of_.assign(found_.data(), found_.data() + found);
  const auto comes_before = [values](int32_t a, int32_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  };
  std::partial_sort(best_of_.begin(), best_of_.begin() + count, best_of_.end(), comes_before);
}

}  // namespace understudy
