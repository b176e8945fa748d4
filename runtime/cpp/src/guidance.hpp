// Classifier-free guidance: which rows a call has, and how their predictions become one.
//
// Rows are in a fixed order: first the conditional row of every sample, then the unconditional rows of the guided
// samples.  A sample with a guidance scale of 1 or less costs no unconditional row.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace quantempo::runtime {

struct Rows {
  std::vector<std::size_t> samples;   // the sample of each row
  std::vector<bool> unconditional;    // the branch of each row

  std::size_t size() const { return samples.size(); }
};

// The engine calls of one denoiser evaluation: one when batched (or when nothing is guided), else two.
std::vector<Rows> plan_rows(const std::vector<double>& scales, bool batched);

// `u + g (c - u)` in float64, rounded once; with a rescale factor as arXiv 2305.08891, section 3.4.
class Combine {
 public:
  Combine(const std::vector<double>& scales, double rescale, std::size_t count);

  bool guided() const { return !guided_.empty(); }
  void operator()(const float* conditional, const float* unconditional, float* out);

 private:
  std::vector<std::pair<std::size_t, double>> guided_;
  double rescale_;
  std::size_t batch_, count_;
  std::vector<double> conditional_, result_;
};

}  // namespace quantempo::runtime
