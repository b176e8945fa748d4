#include "loop.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "error.hpp"

namespace quantempo::runtime {

namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

// State of one run.
class Run {
 public:
  Run(Loop& loop, const StepProgram& program, const LoopRequest& request)
      : loop_(loop), model_(loop.model_), program_(program), request_(request),
        count_(element_count(model_.denoiser->latents_shape)), channels_(static_cast<std::size_t>(model_.denoiser->latents_shape[0])),
        registers_(program.registers(), request.batch * count_, channels_, count_ / channels_, *model_.vectors),
        combine_(request.guidance, request.rescale, count_) {
    const auto rows = plan_rows(request.guidance, request.batched);
    lanes_ = loop.lanes_.plan(program, rows, request.conditioning);
    for (const auto& each : rows) decisions_.emplace_back(each.size());
    if (combine_.guided()) combined_.resize(request.batch * count_);
    start();
  }

  void calls() {
    double first = program_.calls[0].timestep;
    for (std::size_t index = 0; index < program_.calls.size(); ++index) {
      const Call& call = program_.calls[index];
      if (index != 0 && call.step != program_.calls[index - 1].step) first = call.timestep;
      stop_if_cancelled(index);
      run_call(call);
      const bool last = index + 1 == program_.calls.size() || program_.calls[index + 1].step != call.step;
      if (request_.on_step && last) report(call.step, first);
    }
  }

  std::vector<float> latents() {
    const float* memory = registers_[kLatents];
    return std::vector<float>(memory, memory + registers_.count());
  }

  LoopResult result;

 private:
  void start() {
    for (std::size_t index = 0; index < program_.state.size(); ++index) {
      const State& state = program_.state[index];
      float* memory = registers_[state.name];
      if (index == 0 && !request_.latents.empty()) {
        std::memcpy(memory, request_.latents.data(), registers_.count() * sizeof *memory);
      } else {
        request_.noise(0, memory);
      }
      for (std::size_t i = 0; i < registers_.count(); ++i) {
        memory[i] = static_cast<float>(static_cast<double>(memory[i]) * state.initial_scale);
      }
    }
  }

  void stop_if_cancelled(std::size_t index) const {
    if (request_.cancelled == nullptr || !request_.cancelled->load(std::memory_order_relaxed)) return;
    throw Error(Kind::Cancelled, "call " + std::to_string(index), "a request to cancel", "a run to its end",
                "cancel was called", "sample again");
  }

  void run_call(const Call& call) {
    const auto group = group_of(call);
    for (std::size_t number = 0; number < lanes_.size(); ++number) {
      Lane& lane = *lanes_[number];
      feed(call, lane);
      lane.set_scalars(call.timestep, group);
      lane.set_vectors(call.vectors);
      result.rows += static_cast<std::int64_t>(lane.rows.size());
      if (!call.decide) {
        evaluate(call.graph, *lane.bindings.at(call.graph), lane.rows.size());
        account(call.graph, number, lane.rows.size());
      } else {
        decide(call, *call.decide, lane, decisions_[number]);
      }
      predicted(lane).pull();
    }
    registers_.place(kPrediction, guided());
    for (const auto& operation : call.update) registers_.apply(operation, request_.noise);
  }

  Buffer& predicted(const Lane& lane) const {
    if (lane.prediction != nullptr) return *lane.prediction;
    throw Error(Kind::EngineError, "graph of the program", "no output " + repr(model_.denoiser->prediction),
                "a graph that predicts", "program and graphs do not belong together", "compile the bundle again");
  }

  void evaluate(const std::string& variant, Binding& binding, std::size_t rows) {
    const auto started = Clock::now();
    binding.run();
    const double spent = seconds(Clock::now() - started);
    Tally& tally = result.variants[variant];
    ++tally.runs;
    tally.rows += static_cast<std::int64_t>(rows);
    tally.seconds += spent;
    ++result.engine_calls;
    result.engine_seconds += spent;
  }

  // Keeps the book of a call that was not decided at run time.
  void account(const std::string& variant, std::size_t number, std::size_t rows) {
    const Variant& described = model_.variants.at(variant);
    if (!described.reads.empty()) result.reused += static_cast<std::int64_t>(rows);
    if (!described.writes.empty()) {
      decisions_[number].forget();
    } else if (!described.reads.empty()) {
      decisions_[number].reused();
    }
  }

  // Runs the probe, then each row's own choice; rows that agree with all others need no copy.
  void decide(const Call& call, const Decide& decide, Lane& lane, Decisions& decisions) {
    evaluate(decide.probe, *lane.bindings.at(decide.probe), lane.rows.size());
    Buffer& indicator = lane.buffer(kIndicator);
    indicator.pull();
    const auto refresh = decisions.choose(decide, indicator.as<float>(), indicator.row_bytes() / sizeof(float));
    for (const bool wanted : {true, false}) {
      const std::string& variant = wanted ? decide.refresh : call.graph;
      std::vector<std::size_t> chosen;
      for (std::size_t row = 0; row < refresh.size(); ++row) {
        if (refresh[row] == wanted) chosen.push_back(row);
      }
      if (!wanted) result.reused += static_cast<std::int64_t>(chosen.size());
      if (chosen.size() == refresh.size()) {
        evaluate(variant, *lane.bindings.at(variant), chosen.size());
        continue;
      }
      for (const auto& rows : chunks(chosen)) {
        Part& part = lane.part(variant, rows.size());
        part.gather(rows);
        evaluate(variant, *part.binding, rows.size());
        part.scatter(rows);
      }
    }
  }

  void feed(const Call& call, Lane& lane) {
    Lane& first = *lanes_[0];
    for (const auto& [name, terms] : call.inputs) {
      Buffer& port = lane.buffer(name);
      float* memory = port.as<float>();
      const float* source = first.buffer(name).as<float>();
      std::size_t row = 0;
      if (&lane == &first) {
        registers_.lin(terms, memory);
        row = request_.batch;
      }
      for (; row < lane.rows.size(); ++row) {
        std::memcpy(memory + row * count_, source + lane.rows.samples[row] * count_, count_ * sizeof *memory);
      }
      port.push();
    }
  }

  float* guided() {
    float* prediction = predicted(*lanes_[0]).as<float>();
    if (!combine_.guided()) return prediction;
    const float* null = lanes_.size() == 1 ? prediction + request_.batch * count_ : predicted(*lanes_[1]).as<float>();
    combine_(prediction, null, combined_.data());
    return combined_.data();
  }

  std::optional<std::int64_t> group_of(const Call& call) {
    const Partition* partition = loop_.partition_;
    if (partition == nullptr) return std::nullopt;
    if (!notified_ && !partition->calibrated(call.key())) {
      notified_ = true;
      if (loop_.notice_) {
        loop_.notice_("OutsideCalibration",
                      partition->unit + " " + general(call.key()) + " lies outside the calibrated range " +
                          general(partition->low) + " to " + general(partition->high) +
                          "; the nearest group's scales are used (calibrate with this scheduler to cover it)");
      }
    }
    return partition->group_of(call.key());
  }

  void report(std::int64_t step, double timestep) {
    auto copy = latents();
    request_.on_step(step, timestep, copy);
    std::memcpy(registers_[kLatents], copy.data(), copy.size() * sizeof(float));
  }

  Loop& loop_;
  const Model& model_;
  const StepProgram& program_;
  const LoopRequest& request_;
  std::size_t count_, channels_;
  Registers registers_;
  Combine combine_;
  std::vector<Lane*> lanes_;
  std::vector<Decisions> decisions_;
  std::vector<float> combined_;
  bool notified_ = false;
};

Loop::Loop(Model model, const Partition* partition, Notice notice)
    : model_(std::move(model)), partition_(partition), notice_(std::move(notice)), lanes_(model_) {
  const auto& group = model_.denoiser->group_input;
  for (const auto& [name, variant] : model_.variants) {
    const auto& inputs = variant.inputs;
    if (!group || partition_ != nullptr || std::find(inputs.begin(), inputs.end(), *group) == inputs.end()) continue;
    throw Error(Kind::EngineError, "graph " + repr(name), "an input " + repr(*group), "a partition with it",
                "the manifest has no partition", "compile the bundle again");
  }
}

void Loop::check(const StepProgram& program) const {
  check_variants(program, model_.variants, *model_.vectors, model_.denoiser->latents_shape[0],
                 "program of " + program.scheduler);
}

LoopResult Loop::run(const StepProgram& program, const LoopRequest& request) {
  const auto started = Clock::now();
  check(program);
  Run run(*this, program, request);
  const auto planned = Clock::now();
  run.calls();
  run.result.total_seconds = seconds(Clock::now() - planned);
  run.result.plan_seconds = seconds(planned - started);
  run.result.latents = run.latents();
  return std::move(run.result);
}

}  // namespace quantempo::runtime
