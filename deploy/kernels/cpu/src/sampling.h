// Choosing a token from logits: the sampling section of docs/numerics.md.
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

 private:
  void penalize(const std::vector<int32_t>& path, float penalty);
  int32_t first_largest(const float* z) const;
  void truncate(const us_sampling& how);
  void keep_largest(int64_t count);
  void keep_top_p(double top_p);
  bool keep_top_p_of_few(double top_p);
  void keep_min_p(float min_p);
  bool cut_kept(double threshold);
  void keep_above(float lowest);
  void weigh_kept();
  void sort_kept();
  int32_t sample(const us_sampling& how, int64_t position);
  void consider(const std::vector<int32_t>& indices, const us_sampling& how, int64_t position);
  int64_t id_of(int32_t index) const { return ids_ ? ids_[index] : index; }

  const Kernels& kernels_;
  int32_t n_ = 0;
  const int64_t* ids_ = nullptr;
  float largest_ = 0.0f;
  Buffer<float> z_, weights_;
  std::vector<int32_t> seen_, kept_;  // kept_: indices that truncation leaves
  bool keeps_all_ = true;
  struct Candidate {
    float z;
    int32_t index;
    float weight;
  };
  std::vector<Candidate> order_;
  Buffer<int32_t> found_;
  Buffer<uint32_t> words_;
  Buffer<float> noise_;
  int32_t best_ = -1;
  float best_score_ = 0.0f;
};

}  // namespace understudy
