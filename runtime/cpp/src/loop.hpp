// The sampling loop: replays a step program over engines.  It owns its bindings and serves one thread at a time.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "decisions.hpp"
#include "lanes.hpp"
#include "registers.hpp"

namespace quantempo::runtime {

// After each step: its index, its first call's timestep, the latents, which may be changed in place.
using OnStep = std::function<void(std::int64_t step, double timestep, std::vector<float>& latents)>;

struct LoopRequest {
  std::size_t batch = 1;
  std::vector<double> guidance;  // one per sample
  double rescale = 0.0;
  bool batched = true;  // both branches in one engine call
  DrawNoise noise;
  std::vector<float> latents;  // standard normals to start from; empty draws them
  Conditioning conditioning;
  OnStep on_step;
  const std::atomic<bool>* cancelled = nullptr;
};

// What one graph variant did in a run.
struct Tally {
  std::int64_t runs = 0, rows = 0;
  double seconds = 0;
};

struct LoopResult {
  std::vector<float> latents;
  double plan_seconds = 0, total_seconds = 0, engine_seconds = 0;
  std::int64_t engine_calls = 0, rows = 0, reused = 0;
  std::map<std::string, Tally> variants;
};

class Loop {
 public:
  Loop(Model model, const Partition* partition, Notice notice);

  // Refuses a program that the variants cannot replay, before anything runs.
  void check(const StepProgram& program) const;
  LoopResult run(const StepProgram& program, const LoopRequest& request);

 private:
  friend class Run;

  Model model_;
  const Partition* partition_;
  Notice notice_;
  Lanes lanes_;
};

}  // namespace quantempo::runtime
