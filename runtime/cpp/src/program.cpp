#include "program.hpp"

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include "data.hpp"

namespace quantempo::runtime {

namespace {

constexpr std::int64_t kVersion = 1;

Terms read_terms(const Node& node) {
  Terms terms;
  for (const auto& pair : node.list()) {
    const auto items = pair.list();
    if (items.size() != 2) wrong(pair.where(), pair.data(), "a list of 2 items");
    terms.emplace_back(items[0].text(), items[1].number());
  }
  return terms;
}

Operation read_operation(const Node& node) {
  if (!node.data().is_object()) wrong(node.where(), node.data(), "Lin or Clamp or Noise or Correct");
  const auto kind = node.given("kind");
  const std::string word = kind && kind->data().is_string() ? kind->text() : "";
  if (word == "lin") {
    node.keys("Lin", {"kind", "to", "terms"});
    return Lin{node.at("Lin", "to").text(), read_terms(node.at("Lin", "terms"))};
  }
  if (word == "clamp") {
    node.keys("Clamp", {"kind", "to", "source", "low", "high"});
    return Clamp{node.at("Clamp", "to").text(), node.at("Clamp", "source").text(), node.at("Clamp", "low").number(),
                 node.at("Clamp", "high").number()};
  }
  if (word == "noise") {
    node.keys("Noise", {"kind", "to", "draw"});
    return Noise{node.at("Noise", "to").text(), node.at("Noise", "draw").integer()};
  }
  if (word == "correct") {
    node.keys("Correct", {"kind", "to", "source", "gain", "bias", "row"});
    return Correct{node.at("Correct", "to").text(), node.at("Correct", "source").text(),
                   node.at("Correct", "gain").text(), node.at("Correct", "bias").text(),
                   node.at("Correct", "row").integer()};
  }
  const Json missing;
  wrong(node.where(), kind ? kind->data() : missing, "a kind among clamp, correct, lin, noise",
        nearest(word, {"clamp", "correct", "lin", "noise"}));
}

Decide read_decide(const Node& node) {
  constexpr const char* type = "Decide";
  node.keys(type, {"probe", "threshold", "refresh", "polynomial", "accumulate", "reference", "max_consecutive"});
  Decide decide;
  decide.probe = node.at(type, "probe").text();
  decide.threshold = node.at(type, "threshold").number();
  if (const auto value = node.given("refresh")) decide.refresh = value->text();
  if (const auto value = node.given("polynomial")) decide.polynomial = value->numbers();
  if (const auto value = node.given("accumulate")) decide.accumulate = value->flag();
  if (const auto value = node.given("reference")) {
    decide.last_refresh = value->one_of({"previous_call", "last_refresh"}) == "last_refresh";
  }
  if (const auto value = node.given("max_consecutive")) decide.max_consecutive = value->integer();
  return decide;
}

Call read_call(const Node& node) {
  constexpr const char* type = "Call";
  node.keys(type, {"timestep", "inputs", "update", "step", "group_key", "graph", "vectors", "decide"});
  Call call;
  call.timestep = node.at(type, "timestep").number();
  for (const auto& [name, terms] : node.at(type, "inputs").entries()) call.inputs.emplace(name, read_terms(terms));
  for (const auto& operation : node.at(type, "update").list()) call.update.push_back(read_operation(operation));
  call.step = node.at(type, "step").integer();
  if (const auto value = node.maybe("group_key")) call.group_key = value->number();
  if (const auto value = node.given("graph")) call.graph = value->text();
  if (const auto value = node.given("vectors")) {
    for (const auto& [name, row] : value->entries()) call.vectors.emplace(name, row.integer());
  }
  if (const auto value = node.maybe("decide")) call.decide = read_decide(*value);
  return call;
}

State read_state(const Node& node) {
  node.keys("State", {"name", "initial_scale"});
  State state;
  if (const auto value = node.given("name")) state.name = value->text();
  if (const auto value = node.given("initial_scale")) state.initial_scale = value->number();
  return state;
}

class Check {
 public:
  explicit Check(const std::string& where) : where_(where) {}

  void program(const StepProgram& program) {
    if (program.calls.empty()) refuse("calls", "none", "at least one");
    std::set<std::string> known;
    for (const auto& state : program.state) known.insert(state.name);
    const Decide* first = nullptr;
    for (std::size_t index = 0; index < program.calls.size(); ++index) call(index, program.calls[index], known);
    if (known.count(kLatents) == 0) refuse("state", "no register 'latents'", "one, as the result");
    for (std::size_t index = 0; index < program.calls.size(); ++index) {
      const auto& decide = program.calls[index].decide;
      if (!decide) continue;
      if (first == nullptr) first = &*decide;
      decision("call " + std::to_string(index) + ": decide", *decide, *first);
    }
  }

  [[noreturn]] void refuse(const std::string& place, const std::string& found, const std::string& wanted) const {
    throw Error(Kind::DataError, where_ + ": " + place, found, wanted,
                "the program is damaged or of another version", "compile the bundle again");
  }

 private:
  void call(std::size_t index, const Call& call, std::set<std::string>& known) const {
    const std::string place = "call " + std::to_string(index);
    const auto reads = [&](const std::string& what, const std::string& name) {
      if (known.count(name) != 0) return;
      refuse(place, what + " reads register " + repr(name) + ", which nothing wrote", "a written one");
    };
    for (const auto& [input, terms] : call.inputs) {
      for (const auto& term : terms) reads("input " + repr(input), term.first);
    }
    known.insert(kPrediction);
    for (const auto& operation : call.update) {
      if (const auto* lin = std::get_if<Lin>(&operation)) {
        for (const auto& term : lin->terms) reads("lin", term.first);
      } else if (const auto* clamp = std::get_if<Clamp>(&operation)) {
        reads("clamp", clamp->source);
      } else if (const auto* correct = std::get_if<Correct>(&operation)) {
        reads("correct", correct->source);
      }
      known.insert(target_of(operation));
    }
    known.erase(kPrediction);
    rows(place, call);
  }

  void rows(const std::string& place, const Call& call) const {
    const auto check = [&](const std::string& what, std::int64_t row) {
      if (row < 0) refuse(place, what + " of row " + std::to_string(row), "a row of at least 0");
    };
    for (const auto& [name, row] : call.vectors) check("vector " + repr(name), row);
    for (const auto& operation : call.update) {
      if (const auto* correct = std::get_if<Correct>(&operation)) check("correct", correct->row);
      const auto* noise = std::get_if<Noise>(&operation);
      if (noise != nullptr && (noise->draw < 0 || noise->draw > 0xFFFFFFFF)) {
        refuse(place, "noise of draw " + std::to_string(noise->draw), "a draw of 0 to 2**32 - 1");
      }
    }
  }

  void decision(const std::string& place, const Decide& decide, const Decide& first) const {
    if (!(std::isfinite(decide.threshold) && decide.threshold >= 0)) {
      refuse(place + ".threshold", Json(decide.threshold).dump(), "a finite number of at least 0");
    }
    if (decide.max_consecutive < 1) {
      refuse(place + ".max_consecutive", std::to_string(decide.max_consecutive), "at least 1");
    }
    if (decide.polynomial.empty()) refuse(place + ".polynomial", "[]", "at least one coefficient, all finite");
    if (decide.probe != first.probe || decide.last_refresh != first.last_refresh) {
      const auto words = [](const Decide& d) { return d.last_refresh ? "'last_refresh'" : "'previous_call'"; };
      refuse(place, "probe " + repr(decide.probe) + " with reference " + words(decide),
             repr(first.probe) + " with " + words(first) + ", as in the calls before");
    }
  }

  const std::string& where_;
};

}  // namespace

const std::string& target_of(const Operation& operation) {
  return std::visit([](const auto& op) -> const std::string& { return op.to; }, operation);
}

std::vector<std::string> Call::runs() const {
  if (!decide) return {graph};
  return {decide->probe, decide->refresh, graph};
}

std::vector<std::string> StepProgram::registers() const {
  std::vector<std::string> names;
  std::set<std::string> seen;
  const auto add = [&](const std::string& name) {
    if (seen.insert(name).second) names.push_back(name);
  };
  for (const auto& each : state) add(each.name);
  for (const auto& call : calls) {
    for (const auto& operation : call.update) {
      if (target_of(operation) != kPrediction) add(target_of(operation));
    }
  }
  return names;
}

std::vector<std::string> StepProgram::variants() const {
  std::vector<std::string> names;
  for (const auto& call : calls) {
    for (const auto& name : call.runs()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

StepProgram read_program(const std::string& text, const std::string& where) {
  constexpr const char* type = "StepProgram";
  const Json data = parse_json(text, where);
  const Node node(data, where);
  node.keys(type, {"scheduler", "steps", "calls", "state", "eta", "version", "options"});
  Check check(where);
  StepProgram program;
  program.scheduler = node.at(type, "scheduler").text();
  program.steps = node.at(type, "steps").integer();
  for (const auto& call : node.at(type, "calls").list()) program.calls.push_back(read_call(call));
  if (const auto value = node.given("state")) {
    program.state.clear();
    for (const auto& state : value->list()) program.state.push_back(read_state(state));
  }
  if (const auto value = node.maybe("eta")) value->number();
  if (const auto value = node.given("options")) {
    for (const auto& entry : value->entries()) {
      const double number = entry.second.number();
      if (entry.first == "fitted_guidance") program.fitted_guidance = number;
    }
  }
  const std::int64_t version = node.has("version") ? node.given("version")->integer() : kVersion;
  if (version != kVersion) check.refuse("version", std::to_string(version), std::to_string(kVersion));
  check.program(program);
  return program;
}

}  // namespace quantempo::runtime
