#include "tensorrt_record.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "../data.hpp"
#include "../error.hpp"
#include "../files.hpp"

namespace quantempo::runtime {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLargestRecord = std::size_t{1} << 26, kLargestPlan = std::size_t{1} << 36;
constexpr const char* kRecord = "engine.json";

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& wanted,
                         const std::string& cause, const std::string& remedy) {
  throw Error(Kind::EngineError, where, found, wanted, cause, remedy);
}

std::string build_line(const std::string& target) { return "run: quantempo build BUNDLE --target " + target; }

struct Record {
  std::string folder, target, library, capability, manifest;
  Json plans;
};

Record read_record(const std::string& folder) {
  const std::string path = folder + "/" + kRecord;
  if (file_type(path) != FileType::Regular) {
    refuse(folder, std::string("no ") + kRecord, "engines that `quantempo build` made",
           "nothing was built for this target yet", build_line("TARGET"));
  }
  const Json data = parse_json(read_file(path, path, kLargestRecord), path);
  try {
    if (data.at("backend").get<std::string>() != "tensorrt") return {};
    return {folder, data.at("target"), data.at("library"), data.at("capability"), data.at("manifest"), data.at("plans")};
  } catch (const Json::exception& error) {
    throw Error(Kind::DataError, path, error.what(), "a record of engines", "it was edited by hand", build_line("TARGET"));
  }
}

Record choose_record(const std::string& bundle, const std::string& target, const std::string& capability) {
  const std::string folder = bundle + "/engines";
  if (!target.empty()) return read_record(folder + "/" + target);
  std::vector<Record> found;
  std::error_code failed;
  std::vector<std::string> places;
  for (fs::directory_iterator at(folder, failed), end; !failed && at != end; at.increment(failed)) {
    if (file_type(at->path().string() + "/" + kRecord) == FileType::Regular) places.push_back(at->path().string());
  }
  std::sort(places.begin(), places.end());
  for (const auto& place : places) {
    Record record = read_record(place);
    if (!record.folder.empty()) found.push_back(std::move(record));
  }
  std::vector<Record> fitting;
  for (const auto& record : found) {
    if (record.capability == capability) fitting.push_back(record);
  }
  if (fitting.empty()) fitting = found;
  if (fitting.size() == 1) return fitting[0];
  std::vector<std::string> names;
  for (const auto& record : fitting) names.push_back(record.target);
  refuse(folder, names.empty() ? "no engines" : "engines for " + join(names), "engines that tensorrt loads",
         names.empty() ? "nothing was built yet" : "the target was not named",
         names.empty() ? build_line("TARGET") : "name one with the setting target=NAME");
}

// A plan is code: whoever can change it runs code as this user.
void check_private(const std::string& folder) {
  struct stat state {};
  if (::stat(folder.c_str(), &state) == 0 && (state.st_uid == ::getuid() || state.st_uid == 0) &&
      (state.st_mode & (S_IWGRP | S_IWOTH)) == 0) {
    return;
  }
  refuse(folder, "a folder that others can write to", "a folder that you alone can write to",
         "plans are code: whoever can change them runs code as you", "run: chmod 700 " + folder);
}

// `VARIANT.DIALECT-TYPE`; a variant may hold points itself.
std::pair<std::string, std::string> split(const std::string& graph) {
  const auto point = graph.rfind('.');
  return point == std::string::npos ? std::make_pair(std::string(), graph)
                                    : std::make_pair(graph.substr(0, point), graph.substr(point + 1));
}

// The plan of the graph itself, or of the same variant in another quantized kind: all have one contract.
std::string find_plan(const Record& record, const std::string& graph) {
  if (record.plans.contains(graph)) return graph;
  const auto [variant, kind] = split(graph);
  const bool is_float = kind.rfind("float", 0) == 0;
  std::vector<std::string> names;
  for (const auto& [name, plan] : record.plans.items()) {
    const auto [other, other_kind] = split(name);
    if (other == variant && (other_kind.rfind("float", 0) == 0) == is_float) return name;
    names.push_back(name);
  }
  refuse(record.folder, "plans of " + (names.empty() ? std::string("nothing") : join(names)), "a plan of " + repr(graph),
         "this graph was not built for the target", build_line(record.target));
}

std::vector<PlanProfile> read_profiles(const Json& plan) {
  std::vector<PlanProfile> profiles;
  for (const auto& each : plan.at("profiles")) {
    PlanProfile profile;
    for (const auto& [name, range] : each.at("sizes").items()) {
      profile[name] = {range.at("low"), range.at("best"), range.at("high")};
    }
    profiles.push_back(std::move(profile));
  }
  return profiles;
}

}  // namespace

PlanFile load_plan(const std::string& graph, const std::string& target, const std::string& capability,
                   const std::string& library) {
  const std::string graphs = graph.substr(0, graph.rfind('/'));
  const std::string bundle = graphs.substr(0, graphs.rfind('/'));
  const std::string file_name = graph.substr(graph.rfind('/') + 1), stem = file_name.substr(0, file_name.rfind('.'));
  const Record record = choose_record(bundle, target, capability);
  if (record.folder.empty()) {
    refuse(bundle, "engines of another library", "plans of tensorrt", "the target is not one of TensorRT", build_line("TARGET"));
  }
  if (record.library != library) {
    refuse(record.folder, "plans of tensorrt " + record.library, "plans of tensorrt " + library,
           "plans are bound to the library version that built them", build_line(record.target));
  }
  if (record.capability != capability) {
    refuse(record.folder, "plans for compute capability " + record.capability, "plans for " + capability +
           ", which this GPU has", "plans are bound to the GPU's generation", "run `quantempo build` on this device");
  }
  check_private(record.folder);
  if (file_digest(bundle + "/manifest.json", "manifest.json") != record.manifest) {
    refuse(record.folder, "engines of the bundle " + record.manifest.substr(0, 12), "engines of this one",
           "the bundle was compiled again after its engines were built", build_line(record.target));
  }
  const std::string name = find_plan(record, stem);
  try {
    const Json& plan = record.plans.at(name);
    const std::string file = plan.at("file"), path = record.folder + "/" + file;
    if (file.find('/') != std::string::npos || file_type(path) != FileType::Regular) {
      refuse(path, "no such plain file", "the plan that engine.json names", "it was moved or replaced",
             build_line(record.target));
    }
    if (plan.value("weights", std::string("plan")) != "plan") {
      refuse(path, "a plan without its weights", "a plan that holds them", "this runtime does not put plans together",
             build_line(record.target) + " --weights plan");
    }
    PlanFile loaded{path, read_file(path, path, kLargestPlan), read_profiles(plan)};
    const std::string wanted = plan.at("entry").at("sha256"), found = file_digest(path, path);
    if (found == wanted) return loaded;
    throw Error(Kind::DigestMismatch, path, "digest " + found.substr(0, 12), wanted.substr(0, 12),
                "the plan was damaged or exchanged; plans are code and are not loaded then", build_line(record.target));
  } catch (const Json::exception& error) {
    throw Error(Kind::DataError, record.folder + "/" + kRecord, error.what(), "a record of engines",
                "it was edited by hand", build_line(record.target));
  }
}

int choose_profile(const std::string& where, const std::vector<PlanProfile>& profiles, const Sizes& sizes) {
  int best = -1;
  std::int64_t nearest_sum = 0;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    std::int64_t sum = 0;
    bool legal = true;
    for (const auto& [name, range] : profiles[i]) {
      const auto size = sizes.find(name);
      if (size == sizes.end()) continue;
      legal = legal && range.low <= size->second && size->second <= range.high;
      sum += std::llabs(range.best - size->second);
    }
    if (legal && (best < 0 || sum < nearest_sum)) best = static_cast<int>(i), nearest_sum = sum;
  }
  if (best >= 0) return best;
  std::string found, wanted;
  for (const auto& [name, size] : sizes) found += (found.empty() ? "" : ", ") + name + " = " + std::to_string(size);
  for (const auto& profile : profiles) {
    for (const auto& [name, range] : profile) {
      wanted += (wanted.empty() ? "" : " or ") + name + "=" + std::to_string(range.low) + ":" +
                std::to_string(range.best) + ":" + std::to_string(range.high);
    }
  }
  refuse(where + ": shapes", found, wanted, "the engine was built for other sizes", "build again with --shapes");
}

}  // namespace quantempo::runtime
