#include "manifest.hpp"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "data.hpp"

namespace quantempo::runtime {

namespace {

constexpr std::int64_t kVersion = 1;
const std::set<std::string>& features() {
  static const std::set<std::string> known = {"corrections-1", "feature-cache-1", "pinned-inputs-1", "scale-groups-1",
                                              "step-program-1"};
  return known;
}

// Version and features come first: a newer manifest has keys that this reader would call unknown.
void check_age(const Json& data) {
  if (!data.is_object()) return;
  const auto version = data.find("version");
  if (version != data.end() && version->is_number_integer() && version->get<std::int64_t>() > kVersion) {
    throw Error(Kind::NewerBundle, std::string(kManifestName) + ".version", version->dump(),
                "at most " + std::to_string(kVersion), "the bundle was written by a newer quantempo",
                "update the C++ runtime of quantempo");
  }
  const auto required = data.find("requires");
  if (required == data.end() || !required->is_array()) return;
  for (const auto& feature : *required) {
    if (feature.is_string() && features().count(feature.get<std::string>()) != 0) continue;
    const std::string name = feature.is_string() ? repr(feature.get<std::string>()) : "that is no word";
    throw Error(Kind::UnknownFeature, std::string(kManifestName) + ".requires", "the feature " + name,
                "only " + join({features().begin(), features().end()}), "the bundle was written by a newer quantempo",
                "update the C++ runtime of quantempo");
  }
}

std::vector<Dimension> read_shape(const Node& node) {
  std::vector<Dimension> shape;
  for (const auto& item : node.list()) {
    if (item.data().is_string()) {
      shape.emplace_back(item.text());
    } else if (item.data().is_number_integer()) {
      shape.emplace_back(item.integer());
    } else {
      wrong(item.where(), item.data(), "int or str");
    }
  }
  return shape;
}

std::vector<TensorSpec> read_specs(const Node& node) {
  std::vector<TensorSpec> specs;
  for (const auto& item : node.list()) {
    item.keys("TensorSpec", {"name", "dtype", "shape"});
    specs.push_back({item.at("TensorSpec", "name").text(), item.at("TensorSpec", "dtype").text(),
                     read_shape(item.at("TensorSpec", "shape"))});
  }
  return specs;
}

FileEntry read_file(const Node& node) {
  node.keys("FileEntry", {"sha256", "size"});
  return {node.at("FileEntry", "sha256").text(), node.at("FileEntry", "size").integer()};
}

GraphEntry read_graph(const Node& node) {
  constexpr const char* type = "GraphEntry";
  node.keys(type, {"file", "data", "variant", "dialect", "float_type", "inputs", "outputs", "reads", "writes"});
  GraphEntry entry;
  entry.file = node.at(type, "file").text();
  entry.data = node.at(type, "data").texts();
  entry.variant = node.at(type, "variant").text();
  entry.dialect = node.at(type, "dialect").one_of({"float", "ort", "portable", "unfold", "fp8"});
  entry.float_type = node.at(type, "float_type").one_of({"float32", "float16", "bfloat16"});
  entry.inputs = read_specs(node.at(type, "inputs"));
  entry.outputs = read_specs(node.at(type, "outputs"));
  if (const auto value = node.given("reads")) entry.reads = value->texts();
  if (const auto value = node.given("writes")) entry.writes = value->texts();
  return entry;
}

ClassInput read_class(const Node& node) {
  constexpr const char* type = "ClassInput";
  node.keys(type, {"name", "count", "null", "names"});
  ClassInput input;
  input.name = node.at(type, "name").text();
  input.count = node.at(type, "count").integer();
  if (const auto value = node.maybe("null")) input.null = value->integer();
  if (const auto value = node.given("names")) input.names = value->text_map();
  return input;
}

ArrayInput read_array(const Node& node) {
  constexpr const char* type = "ArrayInput";
  node.keys(type, {"name", "dtype", "shape", "guided"});
  ArrayInput input{node.at(type, "name").text(), node.at(type, "dtype").text(), read_shape(node.at(type, "shape"))};
  if (const auto value = node.given("guided")) input.guided = value->flag();
  return input;
}

Shape read_sizes(const Node& node) {
  Shape shape;
  for (const auto& size : node.list()) shape.push_back(size.integer());
  return shape;
}

PinnedInput read_pinned(const Node& node) {
  constexpr const char* type = "PinnedInput";
  node.keys(type, {"name", "dtype", "shape", "values"});
  PinnedInput input{node.at(type, "name").text(), node.at(type, "dtype").text(), read_sizes(node.at(type, "shape")),
                    node.at(type, "values").numbers()};
  if (element_count(input.shape) == input.values.size()) return input;
  const Node values = node.at(type, "values");
  wrong(values.where(), values.data(), "numbers that fill the shape " + shown(input.shape));
}

Denoiser read_denoiser(const Node& node) {
  constexpr const char* type = "Denoiser";
  node.keys(type, {"latents_shape", "classes", "arrays", "sample_input", "timestep_input", "prediction", "group_input",
                   "max_batch", "pinned"});
  Denoiser denoiser;
  const Node shape = node.at(type, "latents_shape");
  denoiser.latents_shape = read_sizes(shape);
  bool sound = !denoiser.latents_shape.empty();
  for (const auto size : denoiser.latents_shape) sound = sound && size > 0;
  if (!sound) wrong(shape.where(), shape.data(), "sizes of at least 1");
  element_count(denoiser.latents_shape);
  if (const auto value = node.given("classes")) {
    for (const auto& item : value->list()) denoiser.classes.push_back(read_class(item));
  }
  if (const auto value = node.given("arrays")) {
    for (const auto& item : value->list()) denoiser.arrays.push_back(read_array(item));
  }
  if (const auto value = node.given("pinned")) {
    for (const auto& item : value->list()) denoiser.pinned.push_back(read_pinned(item));
  }
  if (const auto value = node.given("sample_input")) denoiser.sample_input = value->text();
  if (const auto value = node.given("timestep_input")) denoiser.timestep_input = value->text();
  if (const auto value = node.given("prediction")) denoiser.prediction = value->text();
  if (const auto value = node.maybe("group_input")) denoiser.group_input = value->text();
  if (const auto value = node.maybe("max_batch")) denoiser.max_batch = value->integer();
  return denoiser;
}

Decoder read_decoder(const Node& node) {
  node.keys("Decoder", {"graph", "scaling", "shift"});
  Decoder decoder;
  if (const auto value = node.maybe("graph")) decoder.graph = value->text();
  if (const auto value = node.given("scaling")) decoder.scaling = value->number();
  if (const auto value = node.given("shift")) decoder.shift = value->number();
  return decoder;
}

ProgramIndex read_index(const Node& node) {
  constexpr const char* type = "ProgramIndex";
  node.keys(type, {"scheduler", "config", "files", "scheduler_file", "default_steps"});
  ProgramIndex index{node.at(type, "scheduler").text(), node.at(type, "config").text(),
                     node.at(type, "files").text_map(), node.at(type, "scheduler_file").text()};
  if (const auto value = node.given("default_steps")) index.default_steps = value->integer();
  return index;
}

Partition read_partition(const Node& node) {
  constexpr const char* type = "Partition";
  node.keys(type, {"edges", "low", "high", "unit"});
  Partition partition{node.at(type, "edges").numbers(), node.at(type, "low").number(), node.at(type, "high").number()};
  if (const auto value = node.given("unit")) partition.unit = value->text();
  for (std::size_t i = 1; i < partition.edges.size(); ++i) {
    if (!(partition.edges[i - 1] < partition.edges[i])) wrong(node.where(), node.data(), "edges that ascend strictly");
  }
  if (partition.low > partition.high) wrong(node.where(), node.data(), "low not above high");
  return partition;
}

CacheIndex read_cache(const Node& node) {
  node.keys("CacheIndex", {"plan", "programs"});
  return {node.at("CacheIndex", "plan").text(), node.at("CacheIndex", "programs").text_map()};
}

}  // namespace

std::int64_t Partition::group_of(double key) const {
  return std::upper_bound(edges.begin(), edges.end(), key) - edges.begin();
}

bool Partition::calibrated(double key) const {
  const double slack = (high - low) / static_cast<double>(std::max<std::size_t>(1, edges.size()));
  return low - slack <= key && key <= high + slack;
}

std::vector<std::string> Manifest::file_names() const {
  std::vector<std::string> names;
  for (const auto& entry : files) names.push_back(entry.first);
  return names;
}

std::vector<std::string> Manifest::graph_names() const {
  std::vector<std::string> names;
  for (const auto& entry : graphs) names.push_back(entry.first);
  return names;
}

Manifest parse_manifest(const std::string& text) {
  constexpr const char* type = "Manifest";
  const Json data = parse_json(text, kManifestName);
  check_age(data);
  const Node node(data, kManifestName);
  node.keys(type, {"name", "precision", "requires", "files", "graphs", "denoiser", "decoder", "programs", "partition",
                   "tables", "plan", "vectors", "cache", "default_guidance", "provenance", "version"});
  Manifest manifest;
  manifest.name = node.at(type, "name").text();
  manifest.precision = node.at(type, "precision").one_of({"float32", "int8", "fp8"});
  manifest.requires_ = node.at(type, "requires").texts();
  for (const auto& [name, entry] : node.at(type, "files").entries()) manifest.files.emplace(name, read_file(entry));
  for (const auto& [name, entry] : node.at(type, "graphs").entries()) manifest.graphs.emplace(name, read_graph(entry));
  manifest.denoiser = read_denoiser(node.at(type, "denoiser"));
  manifest.decoder = read_decoder(node.at(type, "decoder"));
  manifest.programs = read_index(node.at(type, "programs"));
  if (const auto value = node.maybe("partition")) manifest.partition = read_partition(*value);
  if (const auto value = node.maybe("tables")) manifest.tables = value->text();
  if (const auto value = node.maybe("plan")) manifest.plan = value->text();
  if (const auto value = node.maybe("vectors")) manifest.vectors = value->text();
  if (const auto value = node.maybe("cache")) manifest.cache = read_cache(*value);
  if (const auto value = node.given("default_guidance")) manifest.default_guidance = value->number();
  if (const auto value = node.given("provenance")) value->text_map();
  if (const auto value = node.given("version")) value->integer();
  return manifest;
}

}  // namespace quantempo::runtime
