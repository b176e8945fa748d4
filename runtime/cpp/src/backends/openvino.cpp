// OpenVINO on the CPU, through its C API, opened at run time.
//
// Names, types and symbols of a graph's tensors come from the ONNX file: the API shows no symbols, and its numbers of
// element types are not those of every version.  With fixed shapes (the default) a graph is compiled once per set of
// bound sizes, which is faster than once for all.
#include <array>
#include <cstdio>
#include <sstream>

#include "../cpu.hpp"
#include "../error.hpp"
#include "../onnx_file.hpp"
#include "backends.hpp"
#include "library.hpp"
#include "settings.hpp"

namespace quantempo::runtime {

namespace openvino {

namespace {

// Opaque objects and plain structs of the library.
struct Core;
struct Model;
struct Compiled;
struct Request;
struct Tensor;
struct Port;
struct Version {
  const char *build, *description;
};
struct Bounds {
  std::int64_t low, high;
};
struct PartialShape {
  Bounds rank;
  Bounds* dims;
};
struct TensorShape {
  std::int64_t rank;
  std::int64_t* dims;
};
using Status = int;  // 0 is success

constexpr int kYear = 2024, kRelease = 3;  // of the oldest library that the tests of this runtime ran with
constexpr std::size_t kKept = 4;  // compiled sizes that an engine remembers; bindings keep theirs alive themselves

// The functions of the library that the backend uses, found by name.
class Api {
 public:
  explicit Api(const std::string& library)
      : library_(open_library("openvino", library, {"libopenvino_c.so"})) {
    find(get_version, "ov_get_openvino_version");
    find(version_free, "ov_version_free");
    Version found{};
    if (get_version(&found) == 0) {
      version_ = found.build == nullptr ? "" : found.build;
      version_free(&found);
    }
    require_version();
    find(last_error, "ov_get_last_err_msg");
    find(error_info, "ov_get_error_info");
    find(free_text, "ov_free");
    find(core_create, "ov_core_create");
    find(core_free, "ov_core_free");
    find(core_read_model, "ov_core_read_model");
    find(core_compile_model, "ov_core_compile_model");
    find(core_get_property, "ov_core_get_property");
    find(model_reshape, "ov_model_reshape");
    find(model_free, "ov_model_free");
    find(compiled_input_by_name, "ov_compiled_model_input_by_name");
    find(compiled_output_by_name, "ov_compiled_model_output_by_name");
    find(compiled_create_request, "ov_compiled_model_create_infer_request");
    find(compiled_free, "ov_compiled_model_free");
    find(port_type, "ov_port_get_element_type");
    find(port_free, "ov_output_const_port_free");
    find(tensor_create, "ov_tensor_create_from_host_ptr");
    find(tensor_shape, "ov_tensor_get_shape");
    find(tensor_free, "ov_tensor_free");
    find(shape_free, "ov_shape_free");
    find(request_set_tensor, "ov_infer_request_set_tensor");
    find(request_get_tensor, "ov_infer_request_get_tensor");
    find(request_infer, "ov_infer_request_infer");
    find(request_free, "ov_infer_request_free");
  }

  // A refusal becomes an `EngineError` with the library's own words.
  void check(Status status, const std::string& where, const char* wanted) const {
    if (status == 0) return;
    const char* said = last_error();  // a copy of ours to free
    const char* general = error_info(status);
    std::istringstream stream(said != nullptr && said[0] != '\0' ? said : general != nullptr ? general : "no reason given");
    free_text(said);
    std::string found, word;
    while (stream >> word) found += (found.empty() ? "" : " ") + word;
    throw Error(Kind::EngineError, where, found, wanted,
                "the graph and OpenVINO " + version_ + " do not fit, or the inputs are out of range",
                "look at the message above");
  }

  Status (*get_version)(Version*);
  void (*version_free)(Version*);
  const char* (*last_error)();
  const char* (*error_info)(Status);
  void (*free_text)(const char*);
  Status (*core_create)(Core**);
  void (*core_free)(Core*);
  Status (*core_read_model)(const Core*, const char* path, const char* weights, Model**);
  Status (*core_compile_model)(const Core*, const Model*, const char* device, std::size_t words, Compiled**, ...);
  Status (*core_get_property)(const Core*, const char* device, const char* key, char** value);
  Status (*model_reshape)(const Model*, const char** names, const PartialShape* shapes, std::size_t count);
  void (*model_free)(Model*);
  Status (*compiled_input_by_name)(const Compiled*, const char* name, Port**);
  Status (*compiled_output_by_name)(const Compiled*, const char* name, Port**);
  Status (*compiled_create_request)(const Compiled*, Request**);
  void (*compiled_free)(Compiled*);
  Status (*port_type)(const Port*, int*);
  void (*port_free)(Port*);
  Status (*tensor_create)(int type, TensorShape, void* data, Tensor**);
  Status (*tensor_shape)(const Tensor*, TensorShape*);
  void (*tensor_free)(Tensor*);
  Status (*shape_free)(TensorShape*);
  Status (*request_set_tensor)(Request*, const char* name, const Tensor*);
  Status (*request_get_tensor)(const Request*, const char* name, Tensor**);
  Status (*request_infer)(Request*);
  void (*request_free)(Request*);

 private:
  static std::string oldest() {
    return "OpenVINO " + std::to_string(kYear) + "." + std::to_string(kRelease) + " or newer";
  }

  // A build's number begins with year and release, as in 2024.3.0-16041-1e3b88e4e3f; one that somebody compiled may be
  // any words, and is judged by its functions alone.
  void require_version() const {
    int year = 0, release = 0;
    if (std::sscanf(version_.c_str(), "%d.%d", &year, &release) != 2) return;
    if (year > kYear || (year == kYear && release >= kRelease)) return;
    throw Error(Kind::EngineError, "engine 'openvino'", "OpenVINO " + version_, oldest(),
                "the library is older than this runtime", "update OpenVINO");
  }

  template <typename Function>
  void find(Function& function, const char* name) {
    void* symbol = find_symbol(library_, name);
    if (symbol == nullptr) {
      throw Error(Kind::EngineError, "engine 'openvino'",
                  (version_.empty() ? std::string("a library") : "OpenVINO " + version_) + " without " + name, oldest(),
                  "the library is older than this runtime, or another one", "update OpenVINO");
    }
    function = reinterpret_cast<Function>(symbol);
  }

  void* library_;
  std::string version_;
};

// Owns an object of the library.
template <typename Object>
class Held {
 public:
  explicit Held(void (*release)(Object*)) : release_(release) {}
  ~Held() {
    if (object_ != nullptr) release_(object_);
  }
  Held(Held&& other) noexcept : release_(other.release_), object_(other.object_) { other.object_ = nullptr; }
  Held& operator=(Held&&) = delete;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  Object* get() const { return object_; }
  Object** out() { return &object_; }

 private:
  void (*release_)(Object*);
  Object* object_ = nullptr;
};

// What all graphs of a session share.
struct Shared {
  explicit Shared(const std::string& library) : api(library), core(api.core_free) {
    api.check(api.core_create(core.out()), "engine 'openvino'", "OpenVINO with its plugins");
  }

  Api api;
  Held<Core> core;
};

// The narrowest float type that this CPU computes natively.
std::string native_precision(const Shared& shared) {
  char* words = nullptr;
  shared.api.check(shared.api.core_get_property(shared.core.get(), "CPU", "OPTIMIZATION_CAPABILITIES", &words),
                   "engine 'openvino'", "the CPU's capabilities");
  const std::string able = words == nullptr ? "" : words;
  shared.api.free_text(words);
  return able.find("BF16") != std::string::npos ? "bf16" : able.find("FP16") != std::string::npos ? "f16" : "f32";
}

// A graph compiled for one set of sizes.
class OpenVinoGraph {
 public:
  OpenVinoGraph(std::shared_ptr<Shared> shared, std::string where)
      : shared_(std::move(shared)), where_(std::move(where)), compiled_(shared_->api.compiled_free) {}

  Compiled* get() const { return compiled_.get(); }
  Compiled** out() { return compiled_.out(); }

  // A tensor over memory of ours, of the type that the graph has there.
  Held<Tensor> tensor(const Buffer& buffer, bool input) const {
    const Api& api = shared_->api;
    Held<Port> port(api.port_free);
    const char* name = buffer.spec.name.c_str();
    api.check(input ? api.compiled_input_by_name(get(), name, port.out()) : api.compiled_output_by_name(get(), name, port.out()),
              where_, "an input or output of that name");
    int type = 0;
    api.check(api.port_type(port.get(), &type), where_, "a type");
    Held<Tensor> made(api.tensor_free);
    // The library takes a pointer to mutable sizes and does not write to them.
    auto* sizes = const_cast<std::int64_t*>(buffer.shape.data());
    api.check(api.tensor_create(type, {static_cast<std::int64_t>(buffer.shape.size()), sizes}, buffer.data, made.out()),
              where_, "a tensor over our memory");
    return made;
  }

 private:
  std::shared_ptr<Shared> shared_;
  std::string where_;
  Held<Compiled> compiled_;
};

class OpenVinoEngine : public Engine {
 public:
  OpenVinoEngine(std::shared_ptr<Shared> shared, std::string path, const EngineOptions& options, const std::string& dialect);

  std::unique_ptr<Binding> bind(const Sizes& sizes, const Buffers& share) override;
  const Api& api() const { return shared_->api; }

 private:
  std::shared_ptr<OpenVinoGraph> compiled(const Sizes& sizes);
  std::shared_ptr<OpenVinoGraph> compile(const Sizes& sizes) const;
  void reshape(const Model* model, const Sizes& sizes) const;

  std::shared_ptr<Shared> shared_;
  std::string path_, threads_;
  std::map<std::string, std::string> settings_;
  std::vector<std::pair<Sizes, std::shared_ptr<OpenVinoGraph>>> compiled_;  // the last used one at the end
};

class OpenVinoBinding : public Binding {
 public:
  OpenVinoBinding(OpenVinoEngine& engine, std::shared_ptr<OpenVinoGraph> graph, const Sizes& sizes, const Buffers& share);
  void run() override;

 private:
  void attach(const BufferPtr& buffer, bool input);
  void learn();

  OpenVinoEngine& engine_;
  std::shared_ptr<OpenVinoGraph> graph_;
  // The request refers to the tensors, and they to the buffers: destroyed in that order.
  std::vector<Held<Tensor>> tensors_;
  Held<Request> request_;
};

OpenVinoEngine::OpenVinoEngine(std::shared_ptr<Shared> shared, std::string path, const EngineOptions& options,
                               const std::string& dialect)
    : shared_(std::move(shared)), path_(std::move(path)) {
  name = "openvino " + path_.substr(path_.rfind('/') + 1);
  settings_ = checked_settings(name, options.settings,
                               {{"precision", {{"f32", "bf16", "f16", "auto"}}},
                                {"shapes", {{"fixed", "free"}}},
                                {"streams", {{"1"}, true}}});
  if (settings_["precision"] == "auto") settings_["precision"] = native_precision(*shared_);
  if (options.threads > 0) threads_ = std::to_string(options.threads);
  check_external_files(path_);
  simulates_fp8(name, dialect, options);
  const std::string reason = exact_integers() ? "" : saturation_reason(path_);
  if (!reason.empty()) {
    options.tell("SaturationNotice", name + ": OpenVINO has no mode that avoids saturation, results may be wrong (" +
                                         reason + "); use the engine 'ort'");
  }
  auto tensors = graph_tensors(path_);
  inputs = std::move(tensors.inputs);
  outputs = std::move(tensors.outputs);
  // What OpenVINO cannot read is refused now, not at the first call.
  Held<Model> model(api().model_free);
  api().check(api().core_read_model(shared_->core.get(), path_.c_str(), nullptr, model.out()), name,
              "a graph that OpenVINO opens");
}

std::unique_ptr<Binding> OpenVinoEngine::bind(const Sizes& sizes, const Buffers& share) {
  return std::make_unique<OpenVinoBinding>(*this, compiled(sizes), sizes, share);
}

std::shared_ptr<OpenVinoGraph> OpenVinoEngine::compiled(const Sizes& sizes) {
  const Sizes key = settings_.at("shapes") == "fixed" ? sizes : Sizes{};
  std::shared_ptr<OpenVinoGraph> graph;
  for (auto at = compiled_.begin(); at != compiled_.end(); ++at) {
    if (at->first != key) continue;
    graph = at->second;
    compiled_.erase(at);
    break;
  }
  if (!graph) graph = compile(key);
  compiled_.emplace_back(key, graph);
  if (compiled_.size() > kKept) compiled_.erase(compiled_.begin());
  return graph;
}

std::shared_ptr<OpenVinoGraph> OpenVinoEngine::compile(const Sizes& sizes) const {
  Held<Model> model(api().model_free);
  api().check(api().core_read_model(shared_->core.get(), path_.c_str(), nullptr, model.out()), name,
              "a graph that OpenVINO opens");
  if (!sizes.empty()) reshape(model.get(), sizes);
  auto graph = std::make_shared<OpenVinoGraph>(shared_, name);
  // Without the last but one, activations of layers with INT8 weights alone are quantized without being asked.
  const std::string precision = settings_.at("precision"), streams = settings_.at("streams");
  const auto* core = shared_->core.get();
  const Status status = threads_.empty()
      ? api().core_compile_model(core, model.get(), "CPU", 8, graph->out(), "PERFORMANCE_HINT", "LATENCY", "NUM_STREAMS",
                                 streams.c_str(), "INFERENCE_PRECISION_HINT", precision.c_str(),
                                 "DYNAMIC_QUANTIZATION_GROUP_SIZE", "0")
      : api().core_compile_model(core, model.get(), "CPU", 10, graph->out(), "PERFORMANCE_HINT", "LATENCY", "NUM_STREAMS",
                                 streams.c_str(), "INFERENCE_PRECISION_HINT", precision.c_str(),
                                 "DYNAMIC_QUANTIZATION_GROUP_SIZE", "0", "INFERENCE_NUM_THREADS", threads_.c_str());
  api().check(status, name, "a graph that OpenVINO compiles");
  return graph;
}

// Gives every input with symbols its sizes.
void OpenVinoEngine::reshape(const Model* model, const Sizes& sizes) const {
  std::vector<const char*> names;
  std::vector<std::vector<Bounds>> bounds;
  for (const auto& spec : inputs) {
    bool known = false, symbolic = false;
    const Shape shape = resolve(spec, sizes, known);
    for (const auto& dimension : spec.shape) symbolic = symbolic || std::holds_alternative<std::string>(dimension);
    if (!known || !symbolic) continue;
    names.push_back(spec.name.c_str());
    bounds.emplace_back();
    for (const auto size : shape) bounds.back().push_back({size, size});
  }
  if (names.empty()) return;
  std::vector<PartialShape> shapes;
  for (auto& each : bounds) {
    const auto rank = static_cast<std::int64_t>(each.size());
    shapes.push_back({{rank, rank}, each.data()});
  }
  api().check(api().model_reshape(model, names.data(), shapes.data(), names.size()), name, "shapes that fit the graph");
}

OpenVinoBinding::OpenVinoBinding(OpenVinoEngine& engine, std::shared_ptr<OpenVinoGraph> graph, const Sizes& sizes,
                                 const Buffers& share)
    : engine_(engine), graph_(std::move(graph)), request_(engine.api().request_free) {
  const auto make = [&](const TensorSpec& spec, const Shape& shape) { return host_buffer(engine.name, spec, shape); };
  engine.api().check(engine.api().compiled_create_request(graph_->get(), request_.out()), engine.name, "a request");
  inputs = allocate_inputs(engine.name, engine.inputs, sizes, share, make);
  outputs = allocate(engine.name, engine.outputs, sizes, share, make);
  for (const auto& entry : inputs) attach(entry.second, true);
  if (outputs.size() < engine.outputs.size()) learn();
  for (const auto& entry : outputs) attach(entry.second, false);
}

void OpenVinoBinding::attach(const BufferPtr& buffer, bool input) {
  const Api& api = engine_.api();
  tensors_.push_back(graph_->tensor(*buffer, input));
  api.check(api.request_set_tensor(request_.get(), buffer->spec.name.c_str(), tensors_.back().get()), engine_.name,
            "memory that the graph can use");
}

// Where an output's shape does not follow from the inputs' symbols, the graph runs once on zeros to tell it.
void OpenVinoBinding::learn() {
  const Api& api = engine_.api();
  run();
  for (const auto& spec : engine_.outputs) {
    if (outputs.count(spec.name) != 0) continue;
    Held<Tensor> result(api.tensor_free);
    api.check(api.request_get_tensor(request_.get(), spec.name.c_str(), result.out()), engine_.name, "an output");
    TensorShape found{};
    api.check(api.tensor_shape(result.get(), &found), engine_.name, "a shape");
    const Shape shape(found.dims, found.dims + found.rank);
    api.shape_free(&found);
    outputs[spec.name] = host_buffer(engine_.name, spec, shape);
  }
}

void OpenVinoBinding::run() {
  const Api& api = engine_.api();
  if (const Status status = api.request_infer(request_.get())) {
    api.check(status, engine_.name, "inputs that the graph can compute");
  }
}

class OpenVinoBackend : public Backend {
 public:
  explicit OpenVinoBackend(EngineOptions options)
      : options_(std::move(options)), shared_(std::make_shared<Shared>(options_.library)) {}

  std::vector<std::string> dialects() const override { return {"portable", "fp8", "float"}; }

  std::unique_ptr<Engine> open(const std::string& path, const std::string& dialect) override {
    return std::make_unique<OpenVinoEngine>(shared_, path, options_, dialect);
  }

 private:
  EngineOptions options_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace
}  // namespace openvino

std::unique_ptr<Backend> open_openvino(const EngineOptions& options) {
  return std::make_unique<openvino::OpenVinoBackend>(options);
}

}  // namespace quantempo::runtime
