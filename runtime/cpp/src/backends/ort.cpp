// ONNX Runtime on the CPU, through its C API, opened at run time.
#include <algorithm>
#include <array>
#include <mutex>
#include <sstream>

#include "../cpu.hpp"
#include "../error.hpp"
#include "../files.hpp"
#include "../onnx_file.hpp"
#include "backends.hpp"
#include "library.hpp"
#include "ort_api.hpp"
#include "settings.hpp"

namespace quantempo::runtime {

namespace ort {

Api::Api(const std::string& library) {
  void* opened = open_library("ort", library, {"libonnxruntime.so.1", "libonnxruntime.so"});
  using GetBase = const ApiBase* (*)();
  const ApiBase* base = reinterpret_cast<GetBase>(library_symbol(opened, "ort", "OrtGetApiBase"))();
  version_ = base->version();
  table_ = base->get_api(kApiVersion);
  if (table_ != nullptr) return;
  throw Error(Kind::EngineError, "engine 'ort'", "ONNX Runtime " + version_ + ", which has no API version " +
              std::to_string(kApiVersion), "ONNX Runtime 1." + std::to_string(kApiVersion) + " or newer",
              "the library is older than this runtime", "update ONNX Runtime");
}

void Api::refuse(const std::string& where, const char* wanted, Status* status) const {
  const char* words = raw<GetErrorMessage>(static_cast<const Status*>(status));
  std::istringstream stream(words == nullptr ? "no reason given" : words);
  std::string found, word;
  while (stream >> word) found += (found.empty() ? "" : " ") + word;
  raw<ReleaseStatus>(status);
  throw Error(Kind::EngineError, where, found, wanted,
              "the graph and ONNX Runtime " + version_ + " do not fit, or the inputs are out of range",
              "look at the message above");
}

namespace {

constexpr int kErrorsOnly = 3;
constexpr int kArenaAllocator = 1, kDefaultMemory = 0;

// By the library's number of an element type.
constexpr std::array<const char*, 14> kTypes = {"",      "float32", "uint8",   "int8",    "uint16", "int16",  "int32",
                                                "int64", "",        "bool",    "float16", "float64", "uint32", "uint64"};

int type_number(const std::string& dtype) {
  for (std::size_t i = 1; i < kTypes.size(); ++i) {
    if (dtype == kTypes[i]) return static_cast<int>(i);
  }
  return 0;
}

using EnvHeld = Held<Env, ReleaseEnv>;
using OptionsHeld = Held<SessionOptions, ReleaseSessionOptions>;
using SessionHeld = Held<Session, ReleaseSession>;
using MemoryHeld = Held<MemoryInfo, ReleaseMemoryInfo>;
using ValueHeld = Held<Value, ReleaseValue>;
using TypeHeld = Held<TypeInfo, ReleaseTypeInfo>;
using TensorHeld = Held<TensorInfo, ReleaseTensorTypeAndShapeInfo>;
using BindingHeld = Held<IoBinding, ReleaseIoBinding>;
using PrepackedHeld = Held<Prepacked, ReleasePrepackedWeightsContainer>;

// What all graphs of a session share.
struct Shared {
  explicit Shared(const std::string& library) : api(library), env(api), memory(api), prepacked(api) {
    const std::string where = "engine 'ort'";
    api.call<CreateEnv>(where, "an environment", kErrorsOnly, "quantempo", env.out());
    api.call<DisableTelemetryEvents>(where, "no telemetry", static_cast<const Env*>(env.get()));
    api.call<CreateCpuMemoryInfo>(where, "host memory", kArenaAllocator, kDefaultMemory, memory.out());
    api.call<CreatePrepackedWeightsContainer>(where, "memory for packed weights", prepacked.out());
  }

  // One arena for the activations of all graphs that ask for it, which run in turns.  The environment is the process's:
  // where somebody registered an arena before, theirs is used.
  void register_arena() {
    if (arena_) return;
    arena_ = true;
    Status* there = api.raw<CreateAndRegisterAllocator>(env.get(), static_cast<const MemoryInfo*>(memory.get()),
                                                        static_cast<const void*>(nullptr));
    if (there != nullptr) api.raw<ReleaseStatus>(there);
  }

  ValueHeld value(const std::string& where, void* data, std::size_t bytes, const Shape& shape,
                  const std::string& dtype) const {
    ValueHeld made(api);
    api.call<CreateTensorWithDataAsOrtValue>(where, "a tensor over our memory",
                                             static_cast<const MemoryInfo*>(memory.get()), data, bytes, shape.data(),
                                             shape.size(), type_number(dtype), made.out());
    return made;
  }

  Api api;
  EnvHeld env;
  MemoryHeld memory;
  PrepackedHeld prepacked;
  // Weight files by path, mapped once for all graphs.
  std::map<std::string, std::shared_ptr<MappedFile>> weights;

 private:
  bool arena_ = false;
};

class OrtEngine;

class OrtBinding : public Binding {
 public:
  OrtBinding(OrtEngine& engine, const Sizes& sizes, const Buffers& share);
  void run() override;

 private:
  void learn(const Sizes& sizes);
  void attach(const BufferPtr& buffer, bool input);

  OrtEngine& engine_;
  BindingHeld io_;
  std::map<std::string, ValueHeld> values_;
};

class OrtEngine : public Engine {
 public:
  OrtEngine(std::shared_ptr<Shared> shared, const std::string& path, const EngineOptions& options,
            const std::string& dialect);

  std::unique_ptr<Binding> bind(const Sizes& sizes, const Buffers& share) override {
    return std::make_unique<OrtBinding>(*this, sizes, share);
  }

  const Api& api() const { return shared_->api; }
  const Shared& shared() const { return *shared_; }
  Session* session() const { return session_.get(); }

 private:
  void set_options(OptionsHeld& made, const std::string& path, const EngineOptions& options, const std::string& dialect);
  void share_weights(OptionsHeld& made, const std::string& path);
  void create(const OptionsHeld& made, const std::string& path);
  std::vector<TensorSpec> specs(bool input) const;

  std::shared_ptr<Shared> shared_;
  std::vector<ValueHeld> weights_;  // outlive the session
  SessionHeld session_;
};

OrtEngine::OrtEngine(std::shared_ptr<Shared> shared, const std::string& path, const EngineOptions& options,
                     const std::string& dialect)
    : shared_(std::move(shared)), session_(shared_->api) {
  name = "ort " + path.substr(path.rfind('/') + 1);
  check_external_files(path);
  OptionsHeld made(api());
  api().call<CreateSessionOptions>(name, "options", made.out());
  set_options(made, path, options, dialect);
  share_weights(made, path);
  create(made, path);
  inputs = specs(true);
  outputs = specs(false);
}

void OrtEngine::set_options(OptionsHeld& made, const std::string& path, const EngineOptions& options,
                            const std::string& dialect) {
  auto settings = checked_settings(name, options.settings,
                                   {{"optimization", {{"all", "extended", "basic", "none"}}},
                                    {"spinning", {{"on", "off"}}},
                                    {"integers", {{"auto", "fast", "precise"}}},
                                    {"arena", {{"own", "shared"}}}});
  if (simulates_fp8(name, dialect, options)) {
    // Fusions of quantizers make integer operators, which refuse FP8.
    if (settings["optimization"] == "all" || settings["optimization"] == "extended") settings["optimization"] = "basic";
  }
  if (settings["integers"] == "auto") {
    const std::string reason = exact_integers() ? "" : saturation_reason(path);
    settings["integers"] = reason.empty() ? "fast" : "precise";
    if (!reason.empty()) {
      options.tell("SaturationNotice", name + " runs in the precise mode of ONNX Runtime, which is slower: " + reason);
    }
  }
  static const std::map<std::string, int> levels = {{"none", 0}, {"basic", 1}, {"extended", 2}, {"all", 99}};
  const auto entry = [&](const char* key, const char* value) {
    api().call<AddSessionConfigEntry>(name, "a session option", made.get(), key, value);
  };
  if (settings["integers"] == "precise") entry("session.x64quantprecision", "1");
  if (settings["arena"] == "shared") {
    shared_->register_arena();
    entry("session.use_env_allocators", "1");
  }
  entry("session.intra_op.allow_spinning", settings["spinning"] == "on" ? "1" : "0");
  api().call<SetSessionGraphOptimizationLevel>(name, "a session option", made.get(), levels.at(settings["optimization"]));
  api().call<SetIntraOpNumThreads>(name, "a session option", made.get(), options.threads);
  api().call<SetInterOpNumThreads>(name, "a session option", made.get(), 1);
  api().call<SetSessionLogSeverityLevel>(name, "a session option", made.get(), kErrorsOnly);
}

// A graph shares what is packed of its weights, or, where a kernel refuses that, packs for itself: which kernels do
// depends on the processor and the version, so no list of them is complete.
void OrtEngine::create(const OptionsHeld& made, const std::string& path) {
  const auto* env = static_cast<const Env*>(shared_->env.get());
  const auto* options = static_cast<const SessionOptions*>(made.get());
  if (Status* refused = api().raw<CreateSessionWithPrepackedWeightsContainer>(
          env, path.c_str(), options, shared_->prepacked.get(), session_.out())) {
    api().raw<ReleaseStatus>(refused);
    api().call<CreateSession>(name, "a graph that ONNX Runtime opens", env, path.c_str(), options, session_.out());
  }
}

// Products whose kernels keep what they pack in memory that sessions can share.  Convolutions are none: on processors
// with VNNI, QLinearConv packs for a kernel of its own and cannot share that, and a session that is asked to refuses
// to open.  Float convolutions have their weights reordered by the optimizer, per session in any case.
bool packs_to_share(const ExternalTensor& tensor) {
  static const std::set<std::string> products = {"FusedMatMul", "Gemm", "MatMul", "MatMulInteger",
                                                 "MatMulIntegerToFloat", "QLinearMatMul"};
  return !tensor.consumers.empty() && std::all_of(tensor.consumers.begin(), tensor.consumers.end(),
                                                  [](const std::string& op) { return products.count(op) != 0; });
}

// Weights of products are handed over as one mapping of each file: variants of a model then share them, and what ONNX
// Runtime packs them into.  The library maps the others itself.
void OrtEngine::share_weights(OptionsHeld& made, const std::string& path) {
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  for (const auto& tensor : external_tensors(path)) {
    const std::size_t size = element_size(tensor.dtype);
    if (size == 0 || tensor.offset % size != 0 || type_number(tensor.dtype) == 0 || !packs_to_share(tensor)) continue;
    auto& file = shared_->weights[folder + tensor.location];
    if (!file) {
      try {
        file = std::make_shared<MappedFile>(folder + tensor.location);
      } catch (const std::runtime_error& error) {
        throw Error(Kind::EngineError, name + ": external data", std::string(error.what()) + " (" + tensor.location + ")",
                    "a readable file", "missing rights, or a damaged disk", "look at the file's rights");
      }
    }
    const std::size_t bytes = element_count(tensor.shape) * size;
    if (tensor.offset > file->size() || bytes > file->size() - tensor.offset) {
      throw Error(Kind::EngineError, name + ": external data", "tensor " + repr(tensor.name) + " that ends after " +
                  std::to_string(file->size()) + " bytes", "a tensor inside " + tensor.location,
                  "graph and weights do not belong together", "compile the bundle again");
    }
    if (bytes == 0) continue;
    // ONNX Runtime takes a pointer to mutable memory and does not write to initializers.
    auto* data = const_cast<unsigned char*>(file->data() + tensor.offset);
    weights_.push_back(shared_->value(name, data, bytes, tensor.shape, tensor.dtype));
    api().call<AddInitializer>(name, "a weight", made.get(), tensor.name.c_str(),
                               static_cast<const Value*>(weights_.back().get()));
  }
}

std::vector<TensorSpec> OrtEngine::specs(bool input) const {
  const auto* session = static_cast<const Session*>(session_.get());
  std::size_t count = 0;
  Allocator* allocator = nullptr;
  api().call<GetAllocatorWithDefaultOptions>(name, "an allocator", &allocator);
  input ? api().call<SessionGetInputCount>(name, "a count", session, &count)
        : api().call<SessionGetOutputCount>(name, "a count", session, &count);
  std::vector<TensorSpec> found;
  for (std::size_t index = 0; index < count; ++index) {
    char* raw = nullptr;
    input ? api().call<SessionGetInputName>(name, "a name", session, index, allocator, &raw)
          : api().call<SessionGetOutputName>(name, "a name", session, index, allocator, &raw);
    TensorSpec spec{raw, "", {}};
    api().call<AllocatorFree>(name, "freed memory", allocator, static_cast<void*>(raw));
    TypeHeld type(api());
    input ? api().call<SessionGetInputTypeInfo>(name, "a type", session, index, type.out())
          : api().call<SessionGetOutputTypeInfo>(name, "a type", session, index, type.out());
    const TensorInfo* info = nullptr;
    api().call<CastTypeInfoToTensorInfo>(name, "a tensor", static_cast<const TypeInfo*>(type.get()), &info);
    int number = 0;
    std::size_t rank = 0;
    if (info != nullptr) {
      api().call<GetTensorElementType>(name, "a type", info, &number);
      api().call<GetDimensionsCount>(name, "a rank", info, &rank);
    }
    if (number > 0 && static_cast<std::size_t>(number) < kTypes.size()) spec.dtype = kTypes[static_cast<std::size_t>(number)];
    if (spec.dtype.empty()) {
      throw Error(Kind::EngineError, name + ": tensor " + repr(spec.name), "type number " + std::to_string(number),
                  "float, integers or bool", "the runtime has no such type", "cast to float32 inside the graph");
    }
    Shape sizes(rank);
    std::vector<const char*> symbols(rank);
    api().call<GetDimensions>(name, "a shape", info, sizes.data(), rank);
    api().call<GetSymbolicDimensions>(name, "a shape", info, symbols.data(), rank);
    for (std::size_t i = 0; i < rank; ++i) {
      const bool named = symbols[i] != nullptr && symbols[i][0] != '\0';
      if (sizes[i] >= 0) {
        spec.shape.emplace_back(sizes[i]);
      } else {
        // An unnamed dimension gets a name of its own, so that it never equals another one by accident.
        spec.shape.emplace_back(named ? std::string(symbols[i]) : spec.name + "." + std::to_string(i));
      }
    }
    found.push_back(std::move(spec));
  }
  return found;
}

OrtBinding::OrtBinding(OrtEngine& engine, const Sizes& sizes, const Buffers& share)
    : engine_(engine), io_(engine.api()) {
  const auto make = [&](const TensorSpec& spec, const Shape& shape) { return host_buffer(engine.name, spec, shape); };
  engine.api().call<CreateIoBinding>(engine.name, "a binding", engine.session(), io_.out());
  inputs = allocate_inputs(engine.name, engine.inputs, sizes, share, make);
  outputs = allocate(engine.name, engine.outputs, sizes, share, make);
  for (const auto& entry : inputs) attach(entry.second, true);
  if (outputs.size() < engine.outputs.size()) learn(sizes);
  for (const auto& entry : outputs) attach(entry.second, false);
}

void OrtBinding::attach(const BufferPtr& buffer, bool input) {
  const auto& api = engine_.api();
  const auto& spec = buffer->spec;
  const auto made =
      values_.emplace(spec.name, engine_.shared().value(engine_.name, buffer->data, buffer->bytes, buffer->shape, spec.dtype));
  const auto* value = static_cast<const Value*>(made.first->second.get());
  input ? api.call<BindInput>(engine_.name, "a bound input", io_.get(), spec.name.c_str(), value)
        : api.call<BindOutput>(engine_.name, "a bound output", io_.get(), spec.name.c_str(), value);
}

// Where an output's shape does not follow from the inputs' symbols, the graph runs once on zeros to tell it.
void OrtBinding::learn(const Sizes&) {
  const auto& api = engine_.api();
  std::vector<const char*> given, wanted;
  std::vector<const Value*> values;
  for (const auto& spec : engine_.inputs) {
    given.push_back(spec.name.c_str());
    values.push_back(values_.at(spec.name).get());
  }
  std::vector<const TensorSpec*> unknown;
  for (const auto& spec : engine_.outputs) {
    if (outputs.count(spec.name) == 0) unknown.push_back(&spec), wanted.push_back(spec.name.c_str());
  }
  for (std::size_t i = 0; i < unknown.size(); ++i) {
    ValueHeld result(api);
    api.call<Run>(engine_.name, "a graph that runs on zeros, to learn the shapes of its outputs", engine_.session(),
                  static_cast<const void*>(nullptr), given.data(), values.data(), given.size(), wanted.data() + i,
                  std::size_t{1}, result.out());
    TensorHeld info(api);
    api.call<GetTensorTypeAndShape>(engine_.name, "a shape", static_cast<const Value*>(result.get()), info.out());
    std::size_t rank = 0;
    api.call<GetDimensionsCount>(engine_.name, "a rank", static_cast<const TensorInfo*>(info.get()), &rank);
    Shape shape(rank);
    api.call<GetDimensions>(engine_.name, "a shape", static_cast<const TensorInfo*>(info.get()), shape.data(), rank);
    outputs[unknown[i]->name] = host_buffer(engine_.name, *unknown[i], shape);
  }
}

void OrtBinding::run() {
  engine_.api().call<RunWithBinding>(engine_.name, "inputs that the graph can compute", engine_.session(),
                                     static_cast<const void*>(nullptr), static_cast<const IoBinding*>(io_.get()));
}

class OrtBackend : public Backend {
 public:
  explicit OrtBackend(EngineOptions options)
      : options_(std::move(options)), shared_(std::make_shared<Shared>(options_.library)) {}

  std::vector<std::string> dialects() const override { return {"ort", "portable", "fp8", "float"}; }

  std::unique_ptr<Engine> open(const std::string& path, const std::string& dialect) override {
    return std::make_unique<OrtEngine>(shared_, path, options_, dialect);
  }

 private:
  EngineOptions options_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace
}  // namespace ort

std::unique_ptr<Backend> open_ort(const EngineOptions& options) { return std::make_unique<ort::OrtBackend>(options); }

}  // namespace quantempo::runtime
