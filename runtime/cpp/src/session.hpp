// A loaded bundle: takes the arguments of a call, returns latents and pictures.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "engine.hpp"
#include "images.hpp"
#include "loop.hpp"
#include "request.hpp"

namespace quantempo::runtime {

struct SessionOptions {
  std::string backend = "ort", dialect, feature_cache = "auto";
  EngineOptions engine;
};

struct SampleOptions {
  Request request;
  std::int64_t steps = 0;  // 0: the bundle's default, or the program's
  std::string program;     // another step program's JSON text
  std::string feature_cache;
  bool decode = true;
  // After each step: its index, how many there are, its first call's timestep, the latents, to be changed in place.
  std::function<void(std::int64_t step, std::int64_t steps, double timestep, std::vector<float>& latents)> on_step;
  std::function<void(std::int64_t step, const Picture& picture)> on_preview;
  std::int64_t preview_every = 1;
};

struct Output {
  LoopResult loop;
  std::vector<Picture> pictures;
  std::size_t samples = 0;
  std::uint64_t seed = 0;
  double total_seconds = 0, decode_seconds = 0;
};

// Calls wait for each other; `cancel` does not.
class Session {
 public:
  Session(Bundle bundle, SessionOptions options);

  Output sample(const SampleOptions& options);
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  const Bundle& bundle() const { return bundle_; }

 private:
  const StepProgram* choose(const SampleOptions& options, StepProgram& held);
  bool fitted_at(const StepProgram& cached, const Request& request) const;
  void run_uncached(const std::string& mode, const StepProgram& program, const StepProgram* cached = nullptr) const;
  std::vector<Picture> decode(const std::vector<float>& latents);
  Engine& engine(const std::string& variant);
  std::unique_ptr<Engine> open(const GraphEntry& entry);
  Model model();

  Bundle bundle_;
  SessionOptions options_;
  std::unique_ptr<Backend> backend_;
  std::map<std::string, const GraphEntry*> entries_;
  Variants variants_;
  std::map<std::int64_t, const StepProgram*> cached_;
  std::map<std::string, std::unique_ptr<Engine>> engines_;
  std::unique_ptr<Engine> decoder_;
  std::map<std::size_t, std::unique_ptr<Binding>> decoder_bindings_;
  std::unique_ptr<Loop> loop_;
  std::mutex busy_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace quantempo::runtime
