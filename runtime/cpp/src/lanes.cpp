#include "lanes.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"

namespace quantempo::runtime {

namespace {

bool has(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::vector<std::string> names_of(const std::vector<TensorSpec>& specs) {
  std::vector<std::string> names;
  for (const auto& spec : specs) names.push_back(spec.name);
  return names;
}

bool all_fixed(const TensorSpec& spec) {
  return std::all_of(spec.shape.begin(), spec.shape.end(),
                     [](const Dimension& d) { return std::holds_alternative<std::int64_t>(d); });
}

bool fits(const Shape& shape, const TensorSpec& spec, Sizes& sizes) {
  if (shape.size() != spec.shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (const auto* fixed = std::get_if<std::int64_t>(&spec.shape[i])) {
      if (*fixed != shape[i]) return false;
    } else if (sizes.emplace(std::get<std::string>(spec.shape[i]), shape[i]).first->second != shape[i]) {
      return false;
    }
  }
  return true;
}

// Sizes of the symbolic dimensions of an engine's inputs, checked against the shapes that will be fed.
Sizes sizes_of(const Engine& engine, const std::string& graph, const std::map<std::string, Shape>& shapes) {
  Sizes sizes;
  for (const auto& spec : engine.inputs) {
    const Shape& shape = shapes.at(spec.name);
    if (fits(shape, spec, sizes)) continue;
    // A rank-0 timestep or a [1] group is filled with one value; only symbolic rank-1 inputs tell a size.
    if (shape.size() <= 1 && all_fixed(spec)) continue;
    auto legal = spec.shape;
    for (auto& dimension : legal) {
      if (const auto* symbol = std::get_if<std::string>(&dimension)) {
        if (const auto found = sizes.find(*symbol); found != sizes.end()) dimension = found->second;
      }
    }
    throw Error(Kind::RequestError, "graph " + repr(graph) + ", input " + repr(spec.name), "shape " + shown(shape),
                "shape " + shown(spec.shape), "batch or resolution outside what the graph takes",
                "the nearest legal shape is " + shown(legal));
  }
  return sizes;
}

template <typename T>
void fill_with(Buffer& buffer, T value) {
  std::fill_n(buffer.as<T>(), buffer.bytes / sizeof(T), value);
}

// Every element becomes one number, in the buffer's own type.
template <typename Number>
void fill(Buffer& buffer, Number value) {
  const auto& type = buffer.spec.dtype;
  if (type == "float32") {
    fill_with(buffer, static_cast<float>(value));
  } else if (type == "float64") {
    fill_with(buffer, static_cast<double>(value));
  } else if (type == "int64") {
    fill_with(buffer, static_cast<std::int64_t>(value));
  } else if (type == "int32") {
    fill_with(buffer, static_cast<std::int32_t>(value));
  } else {
    throw Error(Kind::EngineError, "input " + repr(buffer.spec.name), "type " + type,
                "float32, float64, int64 or int32", "a graph of another tool", "compile the bundle again");
  }
  buffer.push();
}

// The name of a graph's batch dimension.
std::string batch_symbol(const Engine& engine, const std::string& variant, const Denoiser& denoiser) {
  const TensorSpec* spec = engine.input(denoiser.sample_input);
  if (spec == nullptr) spec = engine.input(denoiser.timestep_input);
  if (spec == nullptr) spec = engine.output(denoiser.prediction);
  const bool ranked = spec != nullptr && !spec->shape.empty();
  if (ranked && std::holds_alternative<std::string>(spec->shape[0])) return std::get<std::string>(spec->shape[0]);
  throw Error(Kind::EngineError, "graph " + repr(variant),
              "a fixed batch of " + (ranked ? shown(spec->shape[0]) : std::string("1")),
              "a free batch, since each row decides for itself whether it reuses features",
              "the graph was compiled for one batch", "sample without caching, or one row per call");
}

Shape vector_shape(const std::string& variant, const TensorSpec& spec, std::size_t channels) {
  Shape shape;
  for (const auto& dimension : spec.shape) {
    if (const auto* size = std::get_if<std::int64_t>(&dimension)) shape.push_back(*size);
  }
  const bool right = shape.size() == spec.shape.size() && spec.dtype == "float32" && element_count(shape) == channels;
  if (right) return shape;
  throw Error(Kind::EngineError, "graph " + repr(variant) + ", input " + repr(spec.name),
              spec.dtype + " " + shown(spec.shape), "float32 of " + std::to_string(channels) + " elements",
              "graph and vectors file do not belong together", "compile the bundle again");
}

// The register-fed inputs of each variant, in the order in which variants first run.
std::vector<std::pair<std::string, std::set<std::string>>> fed_inputs(const StepProgram& program, const Model& model) {
  std::vector<std::pair<std::string, std::set<std::string>>> fed;
  for (const auto& variant : program.variants()) fed.emplace_back(variant, std::set<std::string>{});
  const auto entry = [&](const std::string& variant) -> std::set<std::string>& {
    return std::find_if(fed.begin(), fed.end(), [&](const auto& e) { return e.first == variant; })->second;
  };
  for (const auto& call : program.calls) {
    for (const auto& [name, terms] : call.inputs) {
      bool taken = false;
      for (const auto& variant : call.runs()) {
        if (model.engine(variant).input(name) == nullptr) continue;
        entry(variant).insert(name);
        taken = true;
      }
      if (taken) continue;
      const auto known = names_of(model.engine(call.graph).inputs);
      throw Error(Kind::EngineError, "graph " + repr(call.graph), "no input " + repr(name) + ", which the program feeds",
                  "one of " + join(known), "program and graph do not belong together", nearest(name, known));
    }
  }
  return fed;
}

}  // namespace

std::set<std::string> Model::shared(const std::string& variant) const {
  std::set<std::string> names = {denoiser->prediction, kIndicator};
  const auto& writes = variants.at(variant).writes;
  names.insert(writes.begin(), writes.end());
  return names;
}

Buffer& Lane::buffer(const std::string& name) const {
  const auto found = buffers.find(name);
  if (found != buffers.end()) return *found->second;
  throw Error(Kind::EngineError, "tensor " + repr(name), "no graph that has it", "an input or output of a graph",
              "program and graphs do not belong together", "compile the bundle again");
}

std::map<std::string, Shape> Lane::shapes(const Engine& engine, const std::string& variant,
                                          const std::set<std::string>& fed, const Conditioning& conditioning) const {
  const auto count = static_cast<std::int64_t>(rows.size());
  const auto with_rows = [&](const Shape& shape, std::size_t skip) {
    Shape found = {count};
    found.insert(found.end(), shape.begin() + static_cast<std::ptrdiff_t>(skip), shape.end());
    return found;
  };
  std::map<std::string, Shape> found;
  for (const auto& name : fed) found[name] = with_rows(model.denoiser->latents_shape, 0);
  found[model.denoiser->timestep_input] = {count};
  if (model.denoiser->group_input) found[*model.denoiser->group_input] = {};
  for (const auto& [name, condition] : conditioning) found[name] = with_rows(condition.shape, 1);
  for (const auto& name : model.variants.at(variant).reads) found[name] = buffer(name).shape;
  for (const auto& spec : engine.inputs) {
    if (const auto array = model.vectors->find(spec.name); array != model.vectors->end()) {
      found[spec.name] = vector_shape(variant, spec, array->second.channels);
    }
    if (found.count(spec.name) != 0) continue;
    throw Error(Kind::RequestError, "graph " + repr(variant) + ", input " + repr(spec.name), "no value for it",
                spec.dtype + " " + shown(spec.shape), "the call leaves a conditioning input out",
                "pass " + spec.name);
  }
  // A register has the size of the latents, whatever else an input of that name is fed with.
  for (const auto& name : fed) {
    const Shape latents = with_rows(model.denoiser->latents_shape, 0);
    if (found.at(name) == latents) continue;
    throw Error(Kind::EngineError, "graph " + repr(variant) + ", input " + repr(name), "shape " + shown(found.at(name)),
                "shape " + shown(latents) + ", since the program feeds registers to it",
                "program and graph do not belong together", "compile the bundle again");
  }
  return found;
}

// The loop reads and writes these buffers as rows of float32; a graph with another type or size must not get there.
void Lane::check(const Buffer& buffer, const std::string& variant) const {
  Shape latents = {static_cast<std::int64_t>(rows.size())};
  const auto& inner = model.denoiser->latents_shape;
  latents.insert(latents.end(), inner.begin(), inner.end());
  const bool whole = buffer.spec.name != kIndicator;
  const bool rows_first = !buffer.shape.empty() && buffer.shape[0] == latents[0];
  if (buffer.spec.dtype == "float32" && (whole ? buffer.shape == latents : rows_first)) return;
  throw Error(Kind::EngineError, "graph " + repr(variant) + ", tensor " + repr(buffer.spec.name),
              buffer.spec.dtype + " " + shown(buffer.shape),
              whole ? "float32 " + shown(latents) : "float32, a row per row",
              "the graph does not fit the manifest", "compile the bundle again");
}

void Lane::bind(const std::string& variant, const std::set<std::string>& fed, const Conditioning& conditioning) {
  Engine& engine = model.engine(variant);
  Sizes found = sizes_of(engine, variant, shapes(engine, variant, fed, conditioning));
  for (const auto& [name, condition] : conditioning) {
    const TensorSpec* spec = engine.input(name);
    if (spec == nullptr || spec->dtype == condition.dtype) continue;
    throw Error(Kind::EngineError, "graph " + repr(variant) + ", input " + repr(name), "type " + spec->dtype,
                "type " + condition.dtype + ", as in the manifest", "the graph does not fit the manifest",
                "compile the bundle again");
  }
  for (const auto& name : fed) {
    const TensorSpec* spec = engine.input(name);
    if (spec->dtype == "float32") continue;
    throw Error(Kind::EngineError, "graph " + repr(variant) + ", input " + repr(name), "type " + spec->dtype, "float32",
                "the program feeds registers to it", "compile the bundle again");
  }
  if (bindings.count(variant) != 0) return;
  std::set<std::string> known;
  for (const auto& spec : engine.inputs) known.insert(spec.name);
  const auto shared = model.shared(variant);
  for (const auto& spec : engine.outputs) {
    if (shared.count(spec.name) != 0) known.insert(spec.name);
  }
  Buffers share;
  for (const auto& [name, held] : buffers) {
    if (known.count(name) != 0) share.emplace(name, held);
  }
  auto binding = engine.bind(found, share);
  for (const auto* side : {&binding->inputs, &binding->outputs}) {
    for (const auto& [name, made] : *side) {
      if (known.count(name) != 0) buffers.emplace(name, made);
    }
  }
  for (const auto& name : {model.denoiser->prediction, std::string(kIndicator)}) {
    if (binding->outputs.count(name) != 0) check(*binding->outputs.at(name), variant);
  }
  for (const auto& name : model.variants.at(variant).writes) {
    const Buffer& feature = buffer(name);
    if (!feature.shape.empty() && feature.shape[0] == static_cast<std::int64_t>(rows.size())) continue;
    throw Error(Kind::EngineError, "graph " + repr(variant) + ", feature " + repr(name), "shape " + shown(feature.shape),
                "rows of the batch first", "the graph does not fit the manifest", "compile the bundle again");
  }
  bindings[variant] = std::move(binding);
  sizes[variant] = std::move(found);
  const auto made = buffers.find(model.denoiser->prediction);
  if (made != buffers.end()) prediction = made->second.get();
}

void Lane::set_scalars(double timestep, std::optional<std::int64_t> group) {
  const auto& denoiser = *model.denoiser;
  if (const auto found = buffers.find(denoiser.timestep_input); found != buffers.end()) fill(*found->second, timestep);
  if (!group || !denoiser.group_input) return;
  if (const auto found = buffers.find(*denoiser.group_input); found != buffers.end()) fill(*found->second, *group);
}

void Lane::set_vectors(const std::map<std::string, std::int64_t>& chosen) {
  for (const auto& [name, row] : chosen) {
    Buffer& port = buffer(name);
    std::memcpy(port.data, model.vectors->at(name).row(row), port.bytes);
    port.push();
  }
}

void Lane::condition(const Conditioning& conditioning) {
  for (const auto& [name, condition] : conditioning) {
    const auto found = buffers.find(name);
    if (found == buffers.end()) continue;
    Buffer& port = *found->second;
    const std::size_t size = condition.conditional.size() / static_cast<std::size_t>(condition.shape.at(0));
    if (size * rows.size() != port.bytes) {
      throw Error(Kind::RequestError, "input " + repr(name), std::to_string(rows.size()) + " rows",
                  "shape " + shown(port.shape), "the graph was compiled for one batch", "sample one row per call");
    }
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const bool other = rows.unconditional[row] && condition.unconditional;
      const auto& source = other ? *condition.unconditional : condition.conditional;
      std::memcpy(port.as<unsigned char>() + row * size, source.data() + rows.samples[row] * size, size);
    }
    port.push();
  }
}

Part& Lane::part(const std::string& variant, std::size_t count) {
  auto& found = parts_[{variant, count}];
  if (!found) found = std::make_unique<Part>(*this, variant, count);
  return *found;
}

Part::Part(Lane& lane, const std::string& variant, std::size_t count) {
  Engine& engine = lane.model.engine(variant);
  const std::string batch = batch_symbol(engine, variant, *lane.model.denoiser);
  Sizes sizes = lane.sizes.at(variant);
  sizes[batch] = static_cast<std::int64_t>(count);
  binding = engine.bind(sizes, {});
  const auto& features = lane.model.variants.at(variant).reads;
  for (const auto& [name, mine] : binding->inputs) {
    const auto& shape = engine.input(name)->shape;
    const bool by_row = !shape.empty() && shape[0] == Dimension(batch);
    (by_row ? given_ : whole_).push_back({mine.get(), &lane.buffer(name), has(features, name)});
  }
  for (const auto& name : lane.model.shared(variant)) {
    const auto found = binding->outputs.find(name);
    if (found != binding->outputs.end()) made_.push_back({found->second.get(), &lane.buffer(name), false});
  }
  for (const auto& pair : made_) {
    if (pair.mine->row_bytes() == pair.lane->row_bytes()) continue;
    throw Error(Kind::EngineError, "graph " + repr(variant) + ", tensor " + repr(pair.mine->spec.name),
                "shape " + shown(pair.mine->shape), "rows of the batch first", "the graph mixes its rows",
                "compile the bundle again");
  }
}

void Part::gather(const std::vector<std::size_t>& chosen) {
  for (const auto& pair : given_) {
    if (pair.feature) pair.lane->pull();
    const std::size_t size = pair.mine->row_bytes();
    for (std::size_t row = 0; row < chosen.size(); ++row) {
      std::memcpy(pair.mine->as<unsigned char>() + row * size, pair.lane->as<unsigned char>() + chosen[row] * size, size);
    }
    pair.mine->push();
  }
  for (const auto& pair : whole_) {
    std::memcpy(pair.mine->data, pair.lane->data, pair.mine->bytes);
    pair.mine->push();
  }
}

void Part::scatter(const std::vector<std::size_t>& chosen) {
  for (const auto& pair : made_) {
    pair.mine->pull();
    pair.lane->pull();
    const std::size_t size = pair.mine->row_bytes();
    for (std::size_t row = 0; row < chosen.size(); ++row) {
      std::memcpy(pair.lane->as<unsigned char>() + chosen[row] * size, pair.mine->as<unsigned char>() + row * size, size);
    }
    pair.lane->push();
  }
}

std::vector<Lane*> Lanes::plan(const StepProgram& program, const std::vector<Rows>& rows,
                               const Conditioning& conditioning) {
  std::vector<Lane*> lanes;
  for (std::size_t index = 0; index < rows.size(); ++index) {
    Key key{rows[index].size(), {}};
    for (const auto& [name, condition] : conditioning) {
      key.second.emplace_back(name, Shape(condition.shape.begin() + 1, condition.shape.end()));
    }
    auto& kept = kept_[index];
    if (!kept.second || kept.first != key) kept = {key, std::make_unique<Lane>(model_, rows[index])};
    kept.second->rows = rows[index];
    lanes.push_back(kept.second.get());
  }
  for (const auto& [variant, fed] : fed_inputs(program, model_)) {
    for (auto* lane : lanes) lane->bind(variant, fed, conditioning);
  }
  const bool several = std::any_of(rows.begin(), rows.end(), [](const Rows& each) { return each.size() > 1; });
  for (const auto& call : program.calls) {
    if (!call.decide || !several) continue;
    batch_symbol(model_.engine(call.graph), call.graph, *model_.denoiser);
    batch_symbol(model_.engine(call.decide->refresh), call.decide->refresh, *model_.denoiser);
  }
  for (auto* lane : lanes) lane->condition(conditioning);
  return lanes;
}

}  // namespace quantempo::runtime
