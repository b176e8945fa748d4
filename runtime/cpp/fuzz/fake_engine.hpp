// An engine of a few lines: each output is a sum over the inputs' bytes of its row, so that wrong sizes are seen.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace quantempo::runtime {

class FakeBinding : public Binding {
 public:
  void run() override {
    float sum = 0;
    for (const auto& entry : inputs) {
      const auto* bytes = entry.second->as<unsigned char>();
      for (std::size_t i = 0; i < entry.second->bytes; ++i) sum += static_cast<float>(bytes[i]) * 1e-4f;
    }
    for (const auto& entry : outputs) {
      auto* values = entry.second->as<float>();
      for (std::size_t i = 0; i < entry.second->bytes / sizeof(float); ++i) values[i] = std::sin(sum + static_cast<float>(i));
    }
  }
};

class FakeEngine : public Engine {
 public:
  FakeEngine(std::string name_, std::vector<TensorSpec> inputs_, std::vector<TensorSpec> outputs_) {
    name = std::move(name_);
    inputs = std::move(inputs_);
    outputs = std::move(outputs_);
  }

  std::unique_ptr<Binding> bind(const Sizes& sizes, const Buffers& share) override {
    const auto make = [&](const TensorSpec& spec, const Shape& shape) { return host_buffer(name, spec, shape); };
    auto binding = std::make_unique<FakeBinding>();
    binding->inputs = allocate(name, inputs, sizes, share, make);
    binding->outputs = allocate(name, outputs, sizes, share, make);
    return binding;
  }
};

}  // namespace quantempo::runtime
