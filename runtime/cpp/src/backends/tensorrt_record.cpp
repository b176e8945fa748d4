#include "tensorrt_record.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <utility>

#include <nlohmann/json.hpp>

#include "../data.hpp"
#include "../error.hpp"
#include "../files.hpp"
#include "../sha256.hpp"

namespace quantempo::runtime {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLargestRecord = std::size_t{1} << 26, kLargestPlan = std::size_t{1} << 36;
constexpr const char* kRecord = "engine.json";
constexpr const char* kBackend = "tensorrt";
constexpr std::int64_t kVersion = 1;

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& wanted,
                         const std::string& cause, const std::string& remedy) {
  throw Error(Kind::EngineError, where, found, wanted, cause, remedy);
}

std::string build_line(const std::string& target) { return "run: quantempo build BUNDLE --target " + target; }

std::string start_of(const std::string& digest) { return digest.substr(0, 12) + "…"; }

std::vector<PlanProfile> read_profiles(const Node& list) {
  std::vector<PlanProfile> profiles;
  for (const auto& each : list.list()) {
    PlanProfile profile;
    for (const auto& [name, range] : each.keys("Profile", {"sizes"}).at("Profile", "sizes").entries()) {
      range.keys("Range", {"low", "best", "high"});
      profile[name] = {range.at("Range", "low").integer(), range.at("Range", "best").integer(),
                       range.at("Range", "high").integer()};
    }
    profiles.push_back(std::move(profile));
  }
  return profiles;
}

// What the plan was made from, what the gate saw and what the builder said is for people and for Python.
PlanRecord read_plan(const Node& node) {
  constexpr const char* type = "PlanRecord";
  node.keys(type, {"file", "entry", "plan_size", "parts", "profiles", "weights", "seconds", "gate", "notices"});
  PlanRecord plan;
  plan.file = node.at(type, "file").text();
  const Node entry = node.at(type, "entry");
  plan.sha256 = entry.keys("FileEntry", {"sha256", "size"}).at("FileEntry", "sha256").text();
  plan.profiles = read_profiles(node.at(type, "profiles"));
  if (const auto weights = node.given("weights")) plan.weights = weights->one_of({"plan", "refit", "bundle"});
  return plan;
}

EngineRecord read_record(const std::string& folder) {
  const std::string path = folder + "/" + kRecord;
  if (file_type(path) != FileType::Regular) {
    refuse(folder, std::string("no ") + kRecord, "engines that `quantempo build` made",
           "nothing was built for this target yet", build_line("TARGET"));
  }
  return parse_record(read_file(path, path, kLargestRecord), path);
}

struct Chosen {
  std::string folder;
  EngineRecord record;
};

// The engines of the named target, else those for this device.
Chosen choose_record(const std::string& bundle, const std::string& target, const std::string& capability) {
  const std::string folder = bundle + "/engines";
  if (!target.empty()) return {folder + "/" + target, read_record(folder + "/" + target)};
  std::vector<std::string> places;
  std::error_code failed;
  for (fs::directory_iterator at(folder, failed), end; !failed && at != end; at.increment(failed)) {
    if (file_type(at->path().string() + "/" + kRecord) == FileType::Regular) places.push_back(at->path().filename().string());
  }
  std::sort(places.begin(), places.end());
  std::map<std::string, EngineRecord> found;
  for (const auto& place : places) {
    try {
      EngineRecord record = read_record(folder + "/" + place);
      if (record.backend == kBackend) found.emplace(place, std::move(record));
    } catch (const Error&) {
      continue;  // of another tool, or damaged: it matters only to who names it
    }
  }
  std::vector<std::string> fitting;
  for (const auto& [place, record] : found) {
    if (record.capability == capability) fitting.push_back(place);
  }
  if (fitting.empty()) {
    for (const auto& entry : found) fitting.push_back(entry.first);
  }
  if (fitting.size() == 1) return {folder + "/" + fitting[0], found.at(fitting[0])};
  refuse(bundle + ": engines", fitting.empty() ? "no engines" : "engines for " + join(fitting),
         std::string("engines that ") + kBackend + " loads",
         fitting.empty() ? "nothing was built yet" : "the target was not named",
         fitting.empty() ? build_line("TARGET") : "name one with the setting target=NAME");
}

// A plan is code: whoever can change it, or put another folder in its place, runs code as this user.
void check_private(const std::string& folder) {
  const auto unusable = [&](const std::string& found, const std::string& remedy) {
    refuse("engine cache " + folder, found, "a folder that you alone can write to",
           "compiled engines are code: whoever can change them runs code as you", remedy);
  };
  const auto octal = [](mode_t mode) {
    std::array<char, 8> text{};
    std::snprintf(text.data(), text.size(), "%o", static_cast<unsigned>(mode & 07777));
    return std::string(text.data());
  };
  std::error_code failed;
  const fs::path real = fs::canonical(folder, failed);
  struct stat state {};
  if (failed || ::stat(real.c_str(), &state) != 0) unusable("a folder that cannot be looked at", "look at the folder's rights");
  if (state.st_uid != ::getuid() && state.st_uid != 0) {
    unusable("a folder of user " + std::to_string(state.st_uid), "choose a folder of your own");
  }
  if ((state.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    unusable("a folder that others can write to (mode " + octal(state.st_mode) + ")", "run: chmod 700 " + real.string());
  }
  for (fs::path parent = real.parent_path();; parent = parent.parent_path()) {
    if (::stat(parent.c_str(), &state) == 0 && (state.st_mode & S_IWOTH) != 0 && (state.st_mode & S_ISVTX) == 0) {
      unusable("a folder in " + parent.string() + ", where anyone can replace it (mode " + octal(state.st_mode) + ")",
               "run: chmod o-w " + parent.string() + ", or choose another folder");
    }
    if (parent == parent.parent_path()) return;
  }
}

// `VARIANT.DIALECT-TYPE`; a variant may hold points itself.
std::pair<std::string, std::string> split(const std::string& graph) {
  const auto point = graph.rfind('.');
  return point == std::string::npos ? std::make_pair(std::string(), graph)
                                    : std::make_pair(graph.substr(0, point), graph.substr(point + 1));
}

bool is_float(const std::string& kind) { return kind.rfind("float", 0) == 0; }

// The leading numbers of a version, `10.13.3` of `10.13.3.post1`.
std::vector<std::string> version_numbers(const std::string& version) {
  std::vector<std::string> numbers;
  for (std::size_t at = 0; at < version.size();) {
    const auto end = std::min(version.find_first_not_of("0123456789", at), version.size());
    if (end == at) break;
    const auto start = std::min(version.find_first_not_of('0', at), end - 1);
    numbers.push_back(version.substr(start, end - start));
    if (end == version.size() || version[end] != '.') break;
    at = end + 1;
  }
  return numbers;
}

// The legal size closest to a size; a range whose ends are swapped has none but its lowest.
std::int64_t legal_size(const SizeRange& range, std::int64_t size) {
  return std::max(range.low, std::min(range.high, size));
}

}  // namespace

EngineRecord parse_record(const std::string& text, const std::string& where) {
  constexpr const char* type = "EngineRecord";
  const Json data = parse_json(text, where);
  const Node node(data, where);
  if (data.is_object()) {
    const auto version = node.given("version");
    if (version && version->data().is_number_integer() && version->data() > kVersion) {
      refuse(where, "version " + version->data().dump(), "version " + std::to_string(kVersion),
             "a newer quantempo built these engines", "build them again, or update quantempo");
    }
  }
  node.keys(type, {"target", "backend", "library", "capability", "manifest", "plans", "version_compatible", "device",
                   "versions", "guard", "version"});
  if (const auto version = node.given("version")) version->integer();
  EngineRecord record;
  record.target = node.at(type, "target").text();
  record.backend = node.at(type, "backend").one_of({"tensorrt", "tensorrt_rtx"});
  record.library = node.at(type, "library").text();
  record.capability = node.at(type, "capability").text();
  record.manifest = node.at(type, "manifest").text();
  for (const auto& [name, plan] : node.at(type, "plans").entries()) record.plans.emplace(name, read_plan(plan));
  return record;
}

std::string find_plan(const std::string& where, const EngineRecord& record, const std::string& graph) {
  if (record.plans.count(graph) != 0) return graph;
  const auto [variant, kind] = split(graph);
  const auto dialect_of = [](const std::string& of) { return of.substr(0, of.find('-')); };
  std::vector<std::string> names;
  std::vector<std::pair<bool, std::string>> serving;
  for (const auto& entry : record.plans) {
    const auto [other, other_kind] = split(entry.first);
    names.push_back(entry.first);
    if (other == variant && is_float(other_kind) == is_float(kind)) {
      serving.emplace_back(dialect_of(other_kind) != dialect_of(kind), entry.first);
    }
  }
  if (!serving.empty()) return std::min_element(serving.begin(), serving.end())->second;
  refuse(where, "plans of " + (names.empty() ? std::string("nothing") : join(names)), "a plan of " + repr(graph),
         "this graph was not built for the target", build_line(record.target) + "; " + nearest(graph, names));
}

PlanFile load_plan(const std::string& graph, const std::string& target, const std::string& capability,
                   const std::string& library) {
  const std::string graphs = graph.substr(0, graph.rfind('/'));
  const std::string bundle = graphs.substr(0, graphs.rfind('/'));
  const std::string file_name = graph.substr(graph.rfind('/') + 1), stem = file_name.substr(0, file_name.rfind('.'));
  const auto [folder, record] = choose_record(bundle, target, capability);
  const std::string again = build_line(record.target);
  if (record.backend != kBackend || version_numbers(record.library) != version_numbers(library)) {
    refuse(folder, "plans of " + record.backend + " " + record.library, std::string("plans of ") + kBackend + " " + library,
           "plans are bound to the library version that built them", again);
  }
  if (record.capability != capability) {
    refuse(folder, "plans for compute capability " + record.capability, "plans for " + capability +
           ", which this GPU has", "plans are bound to the GPU's generation",
           "run `quantempo build` on this device, or with the target that names it");
  }
  const std::string name = find_plan(folder, record, stem);
  check_private(folder);
  const std::string manifest = file_digest(bundle + "/manifest.json", "manifest.json");
  if (manifest != record.manifest) {
    refuse(folder, "engines of the bundle " + start_of(record.manifest), "engines of " + start_of(manifest),
           "the bundle was compiled again after its engines were built", again);
  }
  const PlanRecord& plan = record.plans.at(name);
  const std::string path = folder + "/" + plan.file;
  const bool plain = !plan.file.empty() && plan.file.find('/') == std::string::npos && plan.file.find('\0') == std::string::npos;
  if (!plain || file_type(path) != FileType::Regular) {
    refuse(path, "no such plain file", "the plan that engine.json names", "it was moved or replaced", again);
  }
  if (plan.weights != "plan") {
    refuse(path, "a plan without its weights", "a plan that holds them", "this runtime does not put plans together",
           again + " --weights plan");
  }
  PlanFile loaded{path, read_file(path, path, kLargestPlan), plan.profiles};
  const std::string found = digest_of(loaded.bytes);
  if (found == plan.sha256) return loaded;
  throw Error(Kind::DigestMismatch, path, "digest " + start_of(found), start_of(plan.sha256),
              "the plan was damaged or exchanged; plans are code and are not loaded then", again);
}

int choose_profile(const std::string& where, const std::vector<PlanProfile>& profiles, const Sizes& sizes) {
  // Sums of differences; a record may hold any numbers, and those of a size that fits memory are exact as `double`.
  const auto distance = [&](const PlanProfile& profile, bool to_best) {
    double sum = 0;
    for (const auto& [name, range] : profile) {
      const auto size = sizes.find(name);
      if (size == sizes.end()) continue;
      const std::int64_t wanted = to_best ? range.best : legal_size(range, size->second);
      sum += std::abs(static_cast<double>(wanted) - static_cast<double>(size->second));
    }
    return sum;
  };
  int best = -1, closest = -1;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    const auto at = [&](int index) -> const PlanProfile& { return profiles[static_cast<std::size_t>(index)]; };
    const double off = distance(profiles[i], false);
    if (closest < 0 || off < distance(at(closest), false)) closest = static_cast<int>(i);
    if (off == 0 && (best < 0 || distance(profiles[i], true) < distance(at(best), true))) best = static_cast<int>(i);
  }
  if (best >= 0) return best;
  if (closest < 0) refuse(where + ": shapes", "a plan without sizes", "at least one profile", "the record is damaged", "build again");
  std::vector<std::string> found, nearest_legal, wanted;
  const auto shown = [](const std::string& name, std::int64_t size) { return name + " = " + std::to_string(size); };
  for (const auto& [name, size] : sizes) {
    found.push_back(shown(name, size));
    const auto& profile = profiles[static_cast<std::size_t>(closest)];
    if (const auto range = profile.find(name); range != profile.end()) nearest_legal.push_back(shown(name, legal_size(range->second, size)));
  }
  for (const auto& profile : profiles) {
    std::vector<std::string> ranges;
    for (const auto& [name, range] : profile) {
      ranges.push_back(name + "=" + std::to_string(range.low) + ":" + std::to_string(range.best) + ":" + std::to_string(range.high));
    }
    wanted.push_back(join(ranges, ","));
  }
  refuse(where + ": shapes", join(found), join(wanted, " or "), "the engine was built for other sizes",
         "the nearest legal sizes are " + join(nearest_legal) + "; for others, build again with --shapes");
}

}  // namespace quantempo::runtime
