#include "guidance.hpp"

#include <cmath>
#include <cstring>
#include <utility>

namespace quantempo::runtime {

namespace {

// Standard deviation with `n - 1`, summed strictly from first to last so that every runtime agrees.
double deviation(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum = sum + value;
  const double mean = sum / static_cast<double>(values.size());
  double squares = 0.0;
  for (const double value : values) {
    const double centred = value - mean;
    squares = squares + centred * centred;
  }
  return std::sqrt(squares / (static_cast<double>(values.size()) - 1.0));
}

}  // namespace

std::vector<Rows> plan_rows(const std::vector<double>& scales, bool batched) {
  Rows conditional, unconditional;
  for (std::size_t sample = 0; sample < scales.size(); ++sample) {
    conditional.samples.push_back(sample);
    conditional.unconditional.push_back(false);
    if (scales[sample] > 1.0) {
      unconditional.samples.push_back(sample);
      unconditional.unconditional.push_back(true);
    }
  }
  if (unconditional.size() == 0) return {conditional};
  if (!batched) return {conditional, unconditional};
  conditional.samples.insert(conditional.samples.end(), unconditional.samples.begin(), unconditional.samples.end());
  conditional.unconditional.resize(conditional.samples.size(), true);
  return {conditional};
}

Combine::Combine(const std::vector<double>& scales, double rescale, std::size_t count)
    : rescale_(rescale), batch_(scales.size()), count_(count) {
  for (std::size_t sample = 0; sample < scales.size(); ++sample) {
    if (scales[sample] > 1.0) guided_.emplace_back(sample, scales[sample]);
  }
  if (rescale_ != 0.0 && guided()) conditional_.resize(count), result_.resize(count);
}

void Combine::operator()(const float* conditional, const float* unconditional, float* out) {
  if (guided_.size() < batch_) std::memcpy(out, conditional, batch_ * count_ * sizeof *out);
  for (std::size_t row = 0; row < guided_.size(); ++row) {
    const std::size_t sample = guided_[row].first;
    const double scale = guided_[row].second;
    const float* c = conditional + sample * count_;
    const float* u = unconditional + row * count_;
    float* to = out + sample * count_;
    const auto mixed = [&](std::size_t i) {
      const double null = u[i];
      return null + (static_cast<double>(c[i]) - null) * scale;
    };
    if (rescale_ == 0.0) {
      for (std::size_t i = 0; i < count_; ++i) to[i] = static_cast<float>(mixed(i));
      continue;
    }
    for (std::size_t i = 0; i < count_; ++i) conditional_[i] = c[i], result_[i] = mixed(i);
    const double factor = rescale_ * (deviation(conditional_) / deviation(result_)) + (1.0 - rescale_);
    for (std::size_t i = 0; i < count_; ++i) to[i] = static_cast<float>(result_[i] * factor);
  }
}

}  // namespace quantempo::runtime
