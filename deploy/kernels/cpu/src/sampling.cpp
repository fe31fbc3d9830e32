#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace understudy {

namespace {

// Noise is −log(−log(u)) with u from 2^-24 to 1 − 2^-24, so between −2.82 and 16.64.
constexpr float kLargestNoise = 16.7f;
// How far two orders of summation of the same numbers can differ, relatively; n · 2^-53 is far below it.
constexpr double kSumError = 1e-9;

}  // namespace

int64_t Sampler::choose(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
                        int64_t position, const int64_t* ids) {
  if (!begin(logits, n, how, path, ids)) return kNotFinite;
  if (how.temperature == 0) return id_of(first_largest());
  truncate(how);
  return id_of(sample(how, position));
}

// Penalty and temperature. Returns false where a logit is not finite, or the largest no longer.
bool Sampler::begin(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
                    const int64_t* ids) {
  n_ = n;
  ids_ = ids;
  z_ = logits;
  const Finite found = kernels_.find_maximum(logits, n);
  if (!found.is_finite) return false;
  largest_ = found.maximum;
  const bool is_penalized = how.repetition_penalty != 1.0 && !path.empty();
  if (how.temperature == 0 && !is_penalized) return true;
  processed_.assign(logits, logits + n);
  if (is_penalized) penalize(path, static_cast<float>(how.repetition_penalty));
  float* z = processed_.data();
  if (how.temperature != 0) kernels_.divide(z, static_cast<float>(how.temperature), n, z);
  largest_ = kernels_.find_maximum(z, n).maximum;
  z_ = z;
  return std::isfinite(largest_);  // dividing can overflow
}

int32_t Sampler::first_largest() const {
  for (int32_t i = 0; i < n_; ++i)
    if (z_[i] == largest_) return i;
  return 0;
}

void Sampler::penalize(const std::vector<int32_t>& path, float penalty) {
  seen_ = path;
  std::sort(seen_.begin(), seen_.end());
  seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
  for (const int32_t token : seen_) {
    int64_t index = token;
    if (ids_) {
      const int64_t* place = std::lower_bound(ids_, ids_ + n_, static_cast<int64_t>(token));
      if (place == ids_ + n_ || *place != token) continue;
      index = place - ids_;
    }
    if (index < 0 || index >= n_) continue;
    float& z = processed_[static_cast<size_t>(index)];
    z = z > 0 ? z / penalty : z * penalty;
  }
}

void Sampler::truncate(const us_sampling& how) {
  keeps_all_ = true;
  if (how.top_k > 0 && how.top_k < n_) keep_largest(how.top_k);
  if (how.top_p < 1) keep_top_p(how.top_p);
  if (how.min_p > 0) keep_min_p(static_cast<float>(how.min_p));
}

// Replaces kept_ by every index with z >= lowest, in order of index.
void Sampler::keep_above(float lowest) {
  const int32_t count = find_above(z_, lowest, n_);
  kept_.assign(found_.data(), found_.data() + count);
}

// The first of found_ become the indices of all values >= lowest, ascending; returns how many.
int32_t Sampler::find_above(const float* values, float lowest, int32_t n) {
  if (found_.size() < static_cast<size_t>(n)) found_.resize(static_cast<size_t>(n));
  return kernels_.find_above(values, lowest, n, found_.data());
}

// weights_[i] becomes exp(z − largest) of the i-th kept one.
void Sampler::weigh_kept() {
  weights_.resize(kept_.size());
  for (size_t i = 0; i < kept_.size(); ++i) weights_[i] = z_[kept_[i]];
  kernels_.exp_difference(weights_.data(), largest_, static_cast<int32_t>(weights_.size()), weights_.data());
}

// Largest first, ties by id.
void Sampler::sort_kept() {
  std::sort(kept_.begin(), kept_.end(), [this](int32_t a, int32_t b) { return comes_before(a, b); });
}

void Sampler::keep_largest(int64_t count) {
  float depth = 4.0f;
  do {
    keep_above(largest_ - depth);
    depth = depth > 1e3f ? std::numeric_limits<float>::infinity() : depth * 2;
  } while (static_cast<int64_t>(kept_.size()) < count);
  const auto before = [this](int32_t a, int32_t b) { return comes_before(a, b); };
  std::nth_element(kept_.begin(), kept_.begin() + count, kept_.end(), before);  // there may be thousands
  kept_.resize(static_cast<size_t>(count));
  sort_kept();
  keeps_all_ = false;
}

void Sampler::keep_top_p(double top_p) {
  if (keeps_all_) {
    if (keep_top_p_of_few(top_p)) return;
    keep_above(-std::numeric_limits<float>::infinity());
    sort_kept();
  }
  weigh_kept();
  double total = 0, sum = 0;
  for (const float weight : weights_) total += weight;
  size_t count = 0;
  while (count < kept_.size() && (count == 0 || sum < top_p * total)) sum += weights_[count++];
  kept_.resize(count);
  keeps_all_ = false;
}

// Without sorting the vocabulary: sums are taken in another order than the definition's, which decides nothing unless
// one comes within rounding of the threshold. Returns false then.
bool Sampler::keep_top_p_of_few(double top_p) {
  const double threshold = top_p * kernels_.sum_exp(z_, largest_, n_);
  for (float depth = 5.0f; depth < 100.0f; depth *= 2) {
    keep_above(largest_ - depth);
    weigh_kept();
    double sum = 0;
    for (const float weight : weights_) sum += weight;
    if (sum >= threshold * (1 + kSumError)) return cut_kept(threshold);
  }
  return false;
}

// Leaves the shortest prefix of kept_, largest first, whose weights reach the threshold, in order of index. The prefix's
// end is found by halving, so that few are sorted. Returns false where rounding could decide.
bool Sampler::cut_kept(double threshold) {
  constexpr size_t kFew = 32;
  order_.resize(kept_.size());
  for (size_t i = 0; i < kept_.size(); ++i) order_[i] = {z_[kept_[i]], kept_[i], weights_[i]};
  const auto comes_before = [](const Candidate& a, const Candidate& b) {
    return a.z > b.z || (a.z == b.z && a.index < b.index);
  };
  double before = 0;  // the weights of everything before `begin`
  auto begin = order_.begin(), end = order_.end();
  while (end - begin > static_cast<std::ptrdiff_t>(kFew)) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, comes_before);
    double sum = before;
    for (auto at = begin; at != middle; ++at) sum += at->weight;
    if (std::fabs(sum - threshold) <= kSumError * threshold) return false;
    if (sum > threshold) {
      end = middle;
    } else {
      before = sum;
      begin = middle;
    }
  }
  std::sort(begin, end, comes_before);
  for (auto at = begin; at != end; ++at) {
    before += at->weight;
    if (std::fabs(before - threshold) <= kSumError * threshold) return false;
    if (before < threshold) continue;
    const Candidate last = *at;
    size_t count = 0;
    for (const int32_t index : kept_)
      if (!comes_before(last, {z_[index], index, 0.0f})) kept_[count++] = index;
    kept_.resize(count);
    keeps_all_ = false;
    return true;
  }
  return false;
}

void Sampler::keep_min_p(float min_p) {
  if (keeps_all_) keep_above(-std::numeric_limits<float>::infinity());
  weigh_kept();
  size_t count = 0;
  for (size_t i = 0; i < kept_.size(); ++i)
    if (weights_[i] >= min_p) kept_[count++] = kept_[i];
  kept_.resize(count);
  keeps_all_ = false;
}

// Gumbel-max. Where nothing was cut off, only tokens that the largest noise could lift above the best so far need any.
int32_t Sampler::sample(const us_sampling& how, int64_t position) {
  best_ = -1;
  if (!keeps_all_) {
    consider(kept_, how, position);
    return best_;
  }
  keep_above(largest_ - 3.0f);
  consider(kept_, how, position);
  // The second part allows for the rounding of z + noise where z is large.
  const float reached = best_score_ - kLargestNoise - 1e-6f * std::fabs(largest_);
  const float done = largest_ - 3.0f;
  keep_above(reached);
  const auto is_done = [&](int32_t index) { return z_[index] >= done; };
  kept_.erase(std::remove_if(kept_.begin(), kept_.end(), is_done), kept_.end());
  consider(kept_, how, position);
  return best_;
}

void Sampler::consider(const std::vector<int32_t>& indices, const us_sampling& how, int64_t position) {
  add_noise(indices, how, position);
  for (size_t i = 0; i < indices.size(); ++i) {
    const int32_t index = indices[i];
    const float score = noisy_[i];
    if (best_ < 0 || score > best_score_ || (score == best_score_ && index < best_)) {
      best_ = index;
      best_score_ = score;
    }
  }
}

// noisy_[i] becomes z + noise of the i-th index.
void Sampler::add_noise(const std::vector<int32_t>& indices, const us_sampling& how, int64_t position) {
  noisy_.resize(indices.size());
  tokens_.resize(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    noisy_[i] = z_[indices[i]];
    tokens_[i] = static_cast<int32_t>(id_of(indices[i]));
  }
  const NoiseKey key = {how.seed, how.sample_index, static_cast<uint32_t>(position)};
  kernels_.add_noise(key, tokens_.data(), static_cast<int32_t>(indices.size()), noisy_.data());
}

}  // namespace understudy
