// The step program: a sampler written down as data (docs/step-program.md).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "error.hpp"

namespace quantempo::runtime {

inline constexpr const char* kLatents = "latents";
inline constexpr const char* kPrediction = "prediction";
inline constexpr const char* kIndicator = "indicator";

using Terms = std::vector<std::pair<std::string, double>>;

struct Lin {
  std::string to;
  Terms terms;
};

struct Clamp {
  std::string to, source;
  double low = 0, high = 0;
};

struct Noise {
  std::string to;
  std::int64_t draw = 0;
};

struct Correct {
  std::string to, source, gain, bias;
  std::int64_t row = 0;
};

using Operation = std::variant<Lin, Clamp, Noise, Correct>;

const std::string& target_of(const Operation& operation);

struct Decide {
  std::string probe;
  double threshold = 0;
  std::string refresh = "full";
  std::vector<double> polynomial = {1.0, 0.0};
  bool accumulate = true;
  bool last_refresh = false;  // reference: the row's last refresh, else the previous call
  std::int64_t max_consecutive = 1000;
};

struct Call {
  double timestep = 0;
  std::map<std::string, Terms> inputs;
  std::vector<Operation> update;
  std::int64_t step = 0;
  std::optional<double> group_key;
  std::string graph = "full";
  std::map<std::string, std::int64_t> vectors;
  std::optional<Decide> decide;

  double key() const { return group_key ? *group_key : timestep; }
  // The variants that this call may run, its own graph last.
  std::vector<std::string> runs() const;
};

struct State {
  std::string name = kLatents;
  double initial_scale = 1.0;
};

struct StepProgram {
  std::string scheduler;
  std::int64_t steps = 0;
  std::vector<Call> calls;
  std::vector<State> state = {State{}};
  // The guidance scale that its cache plan was fitted at, for all samples.
  std::optional<double> fitted_guidance;

  // All registers in order of appearance, state first; `prediction` apart.
  std::vector<std::string> registers() const;
  // The variants that it may run, in the order in which they first run.
  std::vector<std::string> variants() const;
};

// Reads and checks a program: closed, of this version, nothing read before it is written.
StepProgram read_program(const std::string& text, const std::string& where);

}  // namespace quantempo::runtime
