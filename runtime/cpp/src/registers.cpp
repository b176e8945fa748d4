#include "registers.hpp"

#include <algorithm>
#include <cstring>

namespace quantempo::runtime {

namespace {

// Sums of a chunk stay in the first-level cache.
constexpr std::size_t kChunk = 512;

}  // namespace

Registers::Registers(const std::vector<std::string>& names, std::size_t count, std::size_t channels, std::size_t inner,
                     const Vectors& vectors)
    : count_(count), channels_(channels), inner_(inner), vectors_(vectors) {
  for (const auto& name : names) {
    auto& memory = memory_[name];
    memory.assign(count, 0.0f);
    pointers_[name] = memory.data();
  }
}

void Registers::lin(const Terms& terms, float* out) {
  if (terms.empty()) {
    std::fill_n(out, count_, 0.0f);
    return;
  }
  if (terms.size() == 1 && terms[0].second == 1.0) {
    const float* source = pointers_.at(terms[0].first);
    if (source != out) std::memcpy(out, source, count_ * sizeof *out);
    return;
  }
  sources_.clear();
  for (const auto& [name, coefficient] : terms) sources_.emplace_back(pointers_.at(name), coefficient);
  double sums[kChunk];
  for (std::size_t start = 0; start < count_; start += kChunk) {
    const std::size_t size = std::min(kChunk, count_ - start);
    const float* first = sources_[0].first + start;
    const double scale = sources_[0].second;
    for (std::size_t i = 0; i < size; ++i) sums[i] = static_cast<double>(first[i]) * scale;
    for (std::size_t term = 1; term < sources_.size(); ++term) {
      const float* source = sources_[term].first + start;
      const double coefficient = sources_[term].second;
      for (std::size_t i = 0; i < size; ++i) sums[i] = sums[i] + static_cast<double>(source[i]) * coefficient;
    }
    for (std::size_t i = 0; i < size; ++i) out[start + i] = static_cast<float>(sums[i]);
  }
}

void Registers::correct(const Correct& operation) {
  const float* source = pointers_.at(operation.source);
  float* out = pointers_.at(operation.to);
  const float* gains = vectors_.at(operation.gain).row(operation.row);
  const float* biases = vectors_.at(operation.bias).row(operation.row);
  for (std::size_t start = 0, channel = 0; start < count_; start += inner_, channel = (channel + 1) % channels_) {
    const double gain = gains[channel], bias = biases[channel];
    for (std::size_t i = start; i < start + inner_; ++i) {
      const double product = static_cast<double>(source[i]) * gain;
      out[i] = static_cast<float>(product + bias);
    }
  }
}

void Registers::apply(const Operation& operation, const DrawNoise& noise) {
  if (const auto* lin_of = std::get_if<Lin>(&operation)) {
    lin(lin_of->terms, pointers_.at(lin_of->to));
  } else if (const auto* clamp = std::get_if<Clamp>(&operation)) {
    const float* source = pointers_.at(clamp->source);
    float* out = pointers_.at(clamp->to);
    const auto low = static_cast<float>(clamp->low), high = static_cast<float>(clamp->high);
    for (std::size_t i = 0; i < count_; ++i) {
      float value = source[i];
      if (value < low) value = low;  // a NaN is below and above nothing, and stays
      if (value > high) value = high;
      out[i] = value;
    }
  } else if (const auto* draw = std::get_if<Noise>(&operation)) {
    noise(draw->draw, pointers_.at(draw->to));
  } else {
    correct(std::get<Correct>(operation));
  }
}

}  // namespace quantempo::runtime
