// Everything that reads a bundle's bytes: manifest, program (replayed where it is accepted), the two together, vectors,
// scale table, graph, record of engines.  The first byte of an input says which.  An `Error` is a right answer; anything
// else that leaves is a finding.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "backends/tensorrt_record.hpp"
#include "bundle.hpp"
#include "data.hpp"
#include "fake_engine.hpp"
#include "loop.hpp"
#include "mutate.hpp"
#include "onnx_file.hpp"
#include "request.hpp"
#include "rng.hpp"
#include "safetensors.hpp"

namespace rt = quantempo::runtime;

namespace {

constexpr std::size_t kMostCalls = 40, kMostOperations = 200, kMostElements = 4096;

const rt::Vectors& vectors() {
  static const rt::Vectors known = {{"gain", {3, 4, std::vector<float>(12, 0.5f)}},
                                    {"bias", {3, 4, std::vector<float>(12, 0.1f)}},
                                    {"cache.0.gain", {2, 4, std::vector<float>(8, 1.5f)}}};
  return known;
}

// Graphs with the signatures that a program is replayed on.
struct Graphs {
  void add(const std::string& name, const rt::GraphEntry& entry) {
    variants.emplace(name, rt::Variant::of(entry));
    engines.emplace(name, std::make_unique<rt::FakeEngine>(name, entry.inputs, entry.outputs));
  }

  rt::Denoiser denoiser;
  rt::Variants variants;
  std::map<std::string, std::unique_ptr<rt::Engine>> engines;
  std::optional<rt::Partition> partition;
};

const Graphs& fixed_graphs() {
  static const Graphs known = [] {
    const rt::TensorSpec sample{"sample", "float32", {"batch", 4, 2, 2}}, timestep{"timestep", "float32", {"batch"}};
    const rt::TensorSpec label{"class_labels", "int64", {"batch"}}, group{"scale_group", "int64", {}};
    const rt::TensorSpec feature{"cache.0", "float32", {"batch", 3}}, prediction{"prediction", "float32", {"batch", 4, 2, 2}};
    const rt::TensorSpec indicator{"indicator", "float32", {"batch", 5}}, gain{"cache.0.gain", "float32", {4}};
    Graphs graphs;
    const auto add = [&](const char* name, std::vector<rt::TensorSpec> inputs, std::vector<rt::TensorSpec> outputs,
                         std::vector<std::string> reads, std::vector<std::string> writes) {
      rt::GraphEntry entry;
      entry.inputs = std::move(inputs), entry.outputs = std::move(outputs);
      entry.reads = std::move(reads), entry.writes = std::move(writes);
      graphs.add(name, entry);
    };
    add("full", {sample, timestep, label, group}, {prediction, feature}, {}, {"cache.0"});
    add("reuse.0", {sample, timestep, feature}, {prediction}, {"cache.0"}, {});
    add("reuse.1", {sample, feature, gain}, {prediction}, {"cache.0"}, {});
    add("probe", {sample, label}, {indicator}, {}, {});
    graphs.denoiser.latents_shape = {4, 2, 2};
    graphs.denoiser.group_input = "scale_group";
    graphs.partition = rt::Partition{{100.0, 500.0}, 0.0, 1000.0, "timestep"};
    return graphs;
  }();
  return known;
}

// Whether a program takes no longer than an input is worth.
bool brief(const rt::StepProgram& program) {
  std::size_t operations = 0;
  for (const auto& call : program.calls) {
    operations += call.update.size();
    for (const auto& operation : call.update) {
      if (const auto* lin = std::get_if<rt::Lin>(&operation)) operations += lin->terms.size();
    }
  }
  return program.calls.size() <= kMostCalls && operations <= kMostOperations;
}

void replay(const rt::StepProgram& program, const Graphs& graphs, const rt::LoopRequest& request) {
  if (!brief(program)) return;
  rt::Model model;
  model.engine = [&](const std::string& name) -> rt::Engine& { return *graphs.engines.at(name); };
  model.denoiser = &graphs.denoiser;
  model.variants = graphs.variants;
  model.vectors = &vectors();
  rt::Loop loop(model, graphs.partition ? &*graphs.partition : nullptr, {});
  const auto result = loop.run(program, request);
  if (result.latents.size() != request.batch * rt::element_count(graphs.denoiser.latents_shape)) std::abort();
}

void replay_fixed(const rt::StepProgram& program, bool batched) {
  rt::LoopRequest request;
  request.batch = 3;
  request.guidance = {1.0, 3.0, 2.0};
  request.rescale = 0.3;
  request.batched = batched;
  request.noise = [](std::int64_t draw, float* out) {
    rt::standard_normal(1, 0, static_cast<std::uint32_t>(draw), out, 48);
  };
  const std::vector<std::int64_t> labels = {1, 2, 3};
  rt::Condition condition{"int64", {3}, std::vector<unsigned char>(24), std::vector<unsigned char>(24)};
  std::memcpy(condition.conditional.data(), labels.data(), 24);
  request.conditioning.emplace("class_labels", condition);
  replay(program, fixed_graphs(), request);
}

bool small(const std::vector<rt::TensorSpec>& specs) {
  return std::all_of(specs.begin(), specs.end(), [](const rt::TensorSpec& spec) {
    std::size_t elements = 1;
    for (const auto& dimension : spec.shape) {
      const auto* size = std::get_if<std::int64_t>(&dimension);
      if (size != nullptr && (*size < 0 || static_cast<std::size_t>(*size) > kMostElements)) return false;
      elements *= size != nullptr ? static_cast<std::size_t>(*size) : 16;
      if (elements > kMostElements) return false;
    }
    return true;
  });
}

// Replays a program on the graphs that a manifest describes, with arguments that it asks for.
void replay_described(const rt::StepProgram& program, const rt::Manifest& manifest) {
  if (rt::element_count(manifest.denoiser.latents_shape) > kMostElements) return;
  for (const char* dialect : {"ort", "portable", "fp8", "float"}) {
    Graphs graphs;
    graphs.denoiser = manifest.denoiser;
    graphs.partition = manifest.partition;
    for (const auto& [name, entry] : rt::denoisers(manifest, dialect)) {
      if (!small(entry->inputs) || !small(entry->outputs)) return;
      graphs.add(name, *entry);
    }
    if (graphs.variants.empty()) continue;
    rt::Request request;
    if (!manifest.denoiser.classes.empty()) request.labels = std::vector<std::int64_t>{1, 0, 1};
    request.batch = 3;
    request.guidance = std::vector<double>{1.0, 3.0, 2.0};
    request.rescale = 0.3;
    std::vector<unsigned char> values(std::size_t{3} * kMostElements * sizeof(double));
    for (const auto& array : manifest.denoiser.arrays) {
      rt::GivenArray given{array.name, array.dtype, {3}, values.data(), 0};
      for (const auto& dimension : array.shape) {
        const auto* size = std::get_if<std::int64_t>(&dimension);
        given.shape.push_back(size != nullptr ? *size : 2);
      }
      const std::size_t count = rt::element_count(given.shape);
      if (count > 3 * kMostElements) return;
      given.bytes = count * rt::element_size(array.dtype);
      request.arrays.push_back(std::move(given));
    }
    replay(program, graphs, rt::resolve(request, manifest).loop);
  }
}

// A manifest and a cached program of it, in one document: {"manifest": ..., "program": ...}.
void read_cached(const std::string& bytes) {
  const rt::Json document = rt::parse_json(bytes, "cached");
  if (!document.is_object() || !document.contains("manifest") || !document.contains("program")) return;
  const rt::Manifest manifest = rt::parse_manifest(document["manifest"].dump());
  rt::check_references(manifest);
  const rt::StepProgram program = rt::read_program(document["program"].dump(), "program");
  rt::check_cached(manifest, "4", "programs/cached.4.json", program, vectors());
  replay_described(program, manifest);
}

void read_graph(const std::string& bytes) {
  const auto* raw = reinterpret_cast<const unsigned char*>(bytes.data());
  const auto known = rt::external_locations(raw, bytes.size());
  for (const auto& tensor : rt::external_tensors(raw, bytes.size())) {
    // What is opened was checked before, so it has to be in the list that was.
    if (std::find(known.begin(), known.end(), tensor.location) == known.end()) std::abort();
    rt::element_count(tensor.shape);
  }
  const auto tensors = rt::graph_tensors(raw, bytes.size(), "graph");
  for (const auto* side : {&tensors.inputs, &tensors.outputs}) {
    for (const auto& spec : *side) {
      bool whole = false;
      const rt::Shape shape = rt::resolve(spec, {{"batch", 3}}, whole);
      if (rt::element_size(spec.dtype) == 0) std::abort();
      if (whole) rt::element_count(shape);
    }
  }
}

void read_record(const std::string& bytes) {
  const rt::EngineRecord record = rt::parse_record(bytes, "engine.json");
  const std::string name = rt::find_plan("engines", record, "full.portable-f16");
  const auto& profiles = record.plans.at(name).profiles;
  const int chosen = rt::choose_profile("plan", profiles, {{"batch", 3}});
  if (chosen < 0 || static_cast<std::size_t>(chosen) >= profiles.size()) std::abort();
}

void read(int kind, const std::string& bytes) {
  switch (kind) {
    case Manifest: return rt::check_references(rt::parse_manifest(bytes));
    case Program: return replay_fixed(rt::read_program(bytes, "program"), true);
    case SplitProgram: return replay_fixed(rt::read_program(bytes, "program"), false);
    case Vectors: return static_cast<void>(rt::read_vectors(bytes, "vectors"));
    case Table: return rt::check_scale_table(bytes, "tables", 2);
    case Graph: return read_graph(bytes);
    case Record: return read_record(bytes);
    default: return read_cached(bytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const int kind = kind_of(data);
  try {
    read(kind, std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
  } catch (const rt::Error& error) {
    if (std::strlen(error.what()) == 0) std::abort();
  } catch (const std::runtime_error&) {
    if (kind != Graph) throw;  // of bytes that are no protobuf message: the caller names the file
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  return mutate(data, size, most, seed);
}
