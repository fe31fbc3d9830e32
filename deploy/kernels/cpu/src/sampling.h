// Choosing tokens from logits: the sampling and the candidates of docs/numerics.md.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "understudy_cpu.h"

namespace understudy {

constexpr int64_t kNotFinite = -1;

class Sampler {
 public:
  explicit Sampler(const Kernels& kernels) : kernels_(kernels) {}

  // ids: token id of each of the n logits, ascending, or null for 0 … n−1. path: tokens so far, repeats allowed.
  // Returns a token id, or kNotFinite.
  int64_t choose(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
                 int64_t position, const int64_t* ids);

  // The `count` best tokens, best first, the first of which `choose` would choose; scores: logarithms of what they are
  // worth, or null. Returns how many there are, fewer where truncation leaves fewer; 0 where a logit is not finite.
  int32_t candidates(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
                     int64_t position, const int64_t* ids, int32_t count, int64_t* tokens, float* scores);

 private:
  bool begin(const float* logits, int32_t n, const us_sampling& how, const std::vector<int32_t>& path,
             const int64_t* ids);
  void penalize(const std::vector<int32_t>& path, float penalty);
  int32_t first_largest() const;
  void truncate(const us_sampling& how);
  void keep_largest(int64_t count);
  void keep_top_p(double top_p);
  bool keep_top_p_of_few(double top_p);
  void keep_min_p(float min_p);
  bool cut_kept(double threshold);
  void keep_above(float lowest);
  int32_t find_above(const float* values, float lowest, int32_t n);
  void weigh_kept();
  void sort_kept();
  int32_t sample(const us_sampling& how, int64_t position);
  void consider(const std::vector<int32_t>& indices, const us_sampling& how, int64_t position);
  void add_noise(const std::vector<int32_t>& indices, const us_sampling& how, int64_t position);
  void find_best(const float* values, int32_t n, float largest, int32_t count);
  bool comes_before(int32_t a, int32_t b) const { return z_[a] > z_[b] || (z_[a] == z_[b] && a < b); }
  int64_t id_of(int32_t index) const { return ids_ ? ids_[index] : index; }

  const Kernels& kernels_;
  int32_t n_ = 0;
  const int64_t* ids_ = nullptr;
  float largest_ = 0.0f;
  const float* z_ = nullptr;  // logits after penalty and temperature
  Buffer<float> processed_, weights_;
  std::vector<int32_t> seen_, kept_;  // kept_: indices that truncation leaves
  bool keeps_all_ = true;
  struct Candidate {
    float z;
    int32_t index;
    float weight;
  };
  std::vector<Candidate> order_;
  Buffer<int32_t> found_;
  std::vector<int32_t> tokens_, best_of_;
  Buffer<float> noisy_;
  int32_t best_ = -1;
  float best_score_ = 0.0f;
};

}  // namespace understudy
