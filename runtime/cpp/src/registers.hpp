// Registers of a step program and the arithmetic on them: float32 values, float64 sums in the written order, no
// contraction, one rounding (docs/step-program.md).
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "program.hpp"
#include "variants.hpp"

namespace quantempo::runtime {

// Fills a tensor of the state's shape with the standard normals of a draw.
using DrawNoise = std::function<void(std::int64_t draw, float* out)>;

class Registers {
 public:
  // `inner` is the number of elements of one channel, `count` that of the whole batch.
  Registers(const std::vector<std::string>& names, std::size_t count, std::size_t channels, std::size_t inner,
            const Vectors& vectors);

  float* operator[](const std::string& name) { return pointers_.at(name); }
  std::size_t count() const { return count_; }

  // Lets a register be foreign memory: the prediction is the engine's own output where no guidance runs.
  void place(const std::string& name, float* memory) { pointers_[name] = memory; }

  void lin(const Terms& terms, float* out);
  void apply(const Operation& operation, const DrawNoise& noise);

 private:
  void correct(const Correct& operation);

  std::size_t count_, channels_, inner_;
  const Vectors& vectors_;
  std::map<std::string, std::vector<float>> memory_;
  std::map<std::string, float*> pointers_;
  std::vector<std::pair<const float*, double>> sources_;
};

}  // namespace quantempo::runtime
