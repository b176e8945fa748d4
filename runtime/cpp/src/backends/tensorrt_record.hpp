// What `quantempo build` left in a bundle for TensorRT: engines/TARGET/engine.json and the plans beside it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../engine.hpp"

namespace quantempo::runtime {

struct SizeRange {
  std::int64_t low = 1, best = 1, high = 1;
};
using PlanProfile = std::map<std::string, SizeRange>;  // by symbolic dimension

struct PlanRecord {
  std::string file, sha256, weights = "plan";
  std::vector<PlanProfile> profiles;
};

struct EngineRecord {
  std::string target, backend, library, capability, manifest;
  std::map<std::string, PlanRecord> plans;  // by graph name
};

// The bytes of an engine.json.  Throws `EngineError` for a newer one, else `DataError`.
EngineRecord parse_record(const std::string& text, const std::string& where);

// The name of the plan that serves a graph: its own, else the same variant in another quantized kind (all have one
// contract), of the graph's own dialect first, then by name.  Throws `EngineError`.
std::string find_plan(const std::string& where, const EngineRecord& record, const std::string& graph);

struct PlanFile {
  std::string where, bytes;
  std::vector<PlanProfile> profiles;
};

// The plan that serves a graph file of a bundle on a device of a compute capability such as "8.9", with every check
// that Python makes: of this library version, for this device, made from this bundle, with the digest that was written
// down, in a folder that nobody else can write to.  Throws `EngineError`, `DataError` or `DigestMismatch`.
PlanFile load_plan(const std::string& graph, const std::string& target, const std::string& capability,
                   const std::string& library);

// The profile that takes these sizes; among several the one whose best sizes are closest.  Throws `EngineError`.
int choose_profile(const std::string& where, const std::vector<PlanProfile>& profiles, const Sizes& sizes);

}  // namespace quantempo::runtime
