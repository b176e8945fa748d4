#include "variants.hpp"

#include <algorithm>

namespace quantempo::runtime {

namespace {

bool has(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

template <typename Map>
std::vector<std::string> names_of(const Map& map) {
  std::vector<std::string> names;
  for (const auto& entry : map) names.push_back(entry.first);
  return names;
}

class Check {
 public:
  Check(const Variants& variants, const Vectors& vectors, std::int64_t channels, const std::string& where)
      : variants_(variants), vectors_(vectors), channels_(channels), where_(where) {}

  void call(std::size_t index, const Call& call) {
    for (const auto& name : call.runs()) {
      if (variants_.count(name) != 0) continue;
      throw Error(Kind::DataError, where_ + ": call " + std::to_string(index), "a call of graph " + repr(name),
                  "one of " + join(names_of(variants_)), "program and bundle do not belong together",
                  nearest(name, names_of(variants_)));
    }
    if (!call.decide) {
      reads(index, call.graph, written_);
      const auto& writes = variants_.at(call.graph).writes;
      written_.insert(writes.begin(), writes.end());
    } else {
      decides(index, call, *call.decide);
    }
    inputs(index, call);
    for (const auto& operation : call.update) {
      if (const auto* correct = std::get_if<Correct>(&operation)) corrects(index, *correct);
    }
  }

 private:
  void decides(std::size_t index, const Call& call, const Decide& decide) {
    const auto& probe = variants_.at(decide.probe);
    const auto& refresh = variants_.at(decide.refresh);
    if (!has(probe.outputs, kIndicator)) {
      refuse(index, "probe " + repr(decide.probe) + " without an output '" + kIndicator + "'",
             "a graph that computes it");
    }
    std::set<std::string> fresh;
    reads(index, decide.probe, fresh);
    fresh.insert(probe.writes.begin(), probe.writes.end());
    reads(index, decide.refresh, fresh);
    // Rows refresh at different calls, so what a row may reuse is what its own refresh wrote, whenever that was.
    fresh.insert(refresh.writes.begin(), refresh.writes.end());
    reads(index, call.graph, fresh);
    written_.insert(fresh.begin(), fresh.end());
  }

  void reads(std::size_t index, const std::string& name, const std::set<std::string>& written) const {
    for (const auto& feature : variants_.at(name).reads) {
      if (written.count(feature) != 0) continue;
      const std::string found = "graph " + repr(name) + ", which reuses feature " + repr(feature);
      if (index == 0) refuse(index, found, "a first call that computes everything");
      refuse(index, found + ", which nothing wrote before", "a call that writes it first");
    }
  }

  void inputs(std::size_t index, const Call& call) const {
    std::set<std::string> taken;
    for (const auto& run : call.runs()) {
      for (const auto& name : variants_.at(run).inputs) {
        if (vectors_.count(name) != 0) taken.insert(name);
      }
    }
    for (const auto& [name, number] : call.vectors) {
      row(index, "input " + repr(name), name, number);
      if (taken.count(name) == 0) {
        refuse(index, "vector " + repr(name) + " for graph " + repr(call.graph), "an input of that name");
      }
    }
    for (const auto& name : taken) {
      if (call.vectors.count(name) != 0) continue;
      refuse(index, "no vector for input " + repr(name) + " of graph " + repr(call.graph), "a row of its array");
    }
  }

  void corrects(std::size_t index, const Correct& correct) const {
    for (const auto& name : {correct.gain, correct.bias}) {
      row(index, "correct", name, correct.row);
      const auto channels = static_cast<std::int64_t>(vectors_.at(name).channels);
      if (channels != channels_) {
        refuse(index, "array " + repr(name) + " of " + std::to_string(channels) + " channels",
               std::to_string(channels_) + " channels, as the latents have");
      }
    }
  }

  void row(std::size_t index, const std::string& what, const std::string& name, std::int64_t number) const {
    const auto found = vectors_.find(name);
    if (found == vectors_.end()) {
      refuse(index, what + " with the unknown vector " + repr(name), "an array of the vectors file",
             nearest(name, names_of(vectors_)));
    }
    const auto rows = static_cast<std::int64_t>(found->second.rows);
    if (number >= 0 && number < rows) return;
    refuse(index, what + " of row " + std::to_string(number) + " of " + repr(name),
           "rows 0 to " + std::to_string(rows - 1));
  }

  [[noreturn]] void refuse(std::size_t index, const std::string& found, const std::string& wanted,
                           const std::string& remedy = "compile the bundle again") const {
    throw Error(Kind::DataError, where_ + ": call " + std::to_string(index), found, wanted,
                "the program was edited by hand, or was made for other graphs", remedy);
  }

  const Variants& variants_;
  const Vectors& vectors_;
  std::int64_t channels_;
  const std::string& where_;
  std::set<std::string> written_;
};

}  // namespace

Variant Variant::of(const GraphEntry& entry) {
  Variant variant;
  for (const auto& spec : entry.inputs) variant.inputs.push_back(spec.name);
  for (const auto& spec : entry.outputs) variant.outputs.push_back(spec.name);
  variant.reads = entry.reads;
  variant.writes = entry.writes;
  return variant;
}

bool is_cached(const StepProgram& program, const Variants& variants) {
  return std::any_of(program.calls.begin(), program.calls.end(), [&](const Call& call) {
    const auto found = variants.find(call.graph);
    return call.decide.has_value() || (found != variants.end() && !found->second.reads.empty());
  });
}

void check_variants(const StepProgram& program, const Variants& variants, const Vectors& vectors,
                    std::int64_t channels, const std::string& where) {
  Check check(variants, vectors, channels, where);
  for (std::size_t index = 0; index < program.calls.size(); ++index) check.call(index, program.calls[index]);
}

}  // namespace quantempo::runtime
