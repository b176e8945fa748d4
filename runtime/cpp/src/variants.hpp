// Whether a step program and a set of graph variants belong together: features, vectors and decisions.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "program.hpp"

namespace quantempo::runtime {

// One array of the vectors file.
struct VectorArray {
  std::size_t rows = 0, channels = 0;
  std::vector<float> values;

  const float* row(std::int64_t index) const { return values.data() + static_cast<std::size_t>(index) * channels; }
};

using Vectors = std::map<std::string, VectorArray>;

struct Variant {
  std::vector<std::string> inputs, outputs, reads, writes;

  static Variant of(const GraphEntry& entry);
};

using Variants = std::map<std::string, Variant>;

// Whether any call of a program may reuse features.
bool is_cached(const StepProgram& program, const Variants& variants);

// Refuses a program that these variants cannot replay, before anything runs; `channels` are those of the latents.
void check_variants(const StepProgram& program, const Variants& variants, const Vectors& vectors,
                    std::int64_t channels, const std::string& where);

}  // namespace quantempo::runtime
