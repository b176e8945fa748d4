// Everything that reads a bundle's bytes: manifest, program (replayed where it is accepted), vectors, scale table, graph.
// The first byte of an input says which.  An `Error` is a right answer; anything else that leaves is a finding.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "data.hpp"
#include "fake_engine.hpp"
#include "loop.hpp"
#include "mutate.hpp"
#include "onnx_file.hpp"
#include "rng.hpp"
#include "safetensors.hpp"

namespace rt = quantempo::runtime;

namespace {

constexpr std::size_t kMostCalls = 40, kMostOperations = 200;

const rt::Vectors& vectors() {
  static const rt::Vectors known = {{"gain", {3, 4, std::vector<float>(12, 0.5f)}},
                                    {"bias", {3, 4, std::vector<float>(12, 0.1f)}},
                                    {"cache.0.gain", {2, 4, std::vector<float>(8, 1.5f)}}};
  return known;
}

struct Graphs {
  Graphs() {
    const rt::TensorSpec sample{"sample", "float32", {"batch", 4, 2, 2}}, timestep{"timestep", "float32", {"batch"}};
    const rt::TensorSpec label{"class_labels", "int64", {"batch"}}, group{"scale_group", "int64", {}};
    const rt::TensorSpec feature{"cache.0", "float32", {"batch", 3}}, prediction{"prediction", "float32", {"batch", 4, 2, 2}};
    const rt::TensorSpec indicator{"indicator", "float32", {"batch", 5}}, gain{"cache.0.gain", "float32", {4}};
    add("full", {sample, timestep, label, group}, {prediction, feature}, {}, {"cache.0"});
    add("reuse.0", {sample, timestep, feature}, {prediction}, {"cache.0"}, {});
    add("reuse.1", {sample, feature, gain}, {prediction}, {"cache.0"}, {});
    add("probe", {sample, label}, {indicator}, {}, {});
    denoiser.latents_shape = {4, 2, 2};
    denoiser.group_input = "scale_group";
  }

  void add(const std::string& name, std::vector<rt::TensorSpec> inputs, std::vector<rt::TensorSpec> outputs,
           std::vector<std::string> reads, std::vector<std::string> writes) {
    rt::GraphEntry entry;
    entry.inputs = inputs, entry.outputs = outputs, entry.reads = reads, entry.writes = writes;
    variants.emplace(name, rt::Variant::of(entry));
    engines.emplace(name, std::make_unique<rt::FakeEngine>(name, std::move(inputs), std::move(outputs)));
  }

  rt::Denoiser denoiser;
  rt::Variants variants;
  std::map<std::string, std::unique_ptr<rt::Engine>> engines;
};

void replay(const rt::StepProgram& program, bool batched) {
  std::size_t operations = 0;
  for (const auto& call : program.calls) {
    operations += call.update.size();
    for (const auto& operation : call.update) {
      if (const auto* lin = std::get_if<rt::Lin>(&operation)) operations += lin->terms.size();
    }
  }
  if (program.calls.size() > kMostCalls || operations > kMostOperations) return;
  static Graphs graphs;
  static const rt::Partition partition{{100.0, 500.0}, 0.0, 1000.0};
  rt::Model model;
  model.engine = [&](const std::string& name) -> rt::Engine& { return *graphs.engines.at(name); };
  model.denoiser = &graphs.denoiser;
  model.variants = graphs.variants;
  model.vectors = &vectors();
  rt::Loop loop(model, &partition, {});
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
  const auto result = loop.run(program, request);
  if (result.latents.size() != 48) std::abort();
}

void read(std::uint8_t which, const std::string& bytes) {
  switch (which % 6) {
    case 0: {
      const rt::Manifest manifest = rt::parse_manifest(bytes);
      rt::check_references(manifest);
      break;
    }
    case 1:
    case 2:
      replay(rt::read_program(bytes, "program"), which % 6 == 1);
      break;
    case 3:
      rt::read_vectors(bytes, "vectors");
      break;
    case 4:
      rt::check_scale_table(bytes, "tables", 2);
      break;
    default: {
      const auto* raw = reinterpret_cast<const unsigned char*>(bytes.data());
      rt::external_locations(raw, bytes.size());
      for (const auto& tensor : rt::external_tensors(raw, bytes.size())) rt::element_count(tensor.shape);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    read(data[0], bytes);
  } catch (const rt::Error& error) {
    if (std::strlen(error.what()) == 0) std::abort();
  } catch (const std::runtime_error&) {
    // Of bytes that are no protobuf message: the caller names the file.
    if (data[0] % 6 != 5) throw;
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  return mutate(data, size, most, seed);
}
