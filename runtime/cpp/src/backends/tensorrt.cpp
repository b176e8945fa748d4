// TensorRT: runs the plans that `quantempo build` left in the bundle; it never builds.
//
// Compiled where TensorRT's and CUDA's headers are (TENSORRT_ROOT).  Registers and guidance are computed on the host:
// what the loop writes is pushed before a call, what it reads is pulled after it.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>

#include "../error.hpp"
#include "../onnx_file.hpp"
#include "backends.hpp"
#include "settings.hpp"
#include "tensorrt_record.hpp"

namespace quantempo::runtime {

namespace tensorrt {

namespace {

void check(cudaError_t status, const std::string& where, const char* wanted) {
  if (status == cudaSuccess) return;
  throw Error(Kind::EngineError, where, cudaGetErrorString(status), wanted, "the GPU refused, or there is none",
              "look at nvidia-smi");
}

// Keeps the last error: the library says why on its log only.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(busy_);
      last_ = message;
    } catch (...) {  // no memory for the words: the refusal stands without them
    }
  }

  std::string last() const {
    const std::lock_guard<std::mutex> lock(busy_);
    return last_.empty() ? "nothing" : last_;
  }

 private:
  mutable std::mutex busy_;
  std::string last_;
};

// What all graphs of a session share: the device that is current on the thread that opens, one stream.
struct Shared {
  Shared() {
    check(cudaGetDevice(&device), "engine 'tensorrt'", "an NVIDIA GPU");
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "engine 'tensorrt'", "an NVIDIA GPU");
    capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    check(cudaStreamCreate(&stream), "engine 'tensorrt'", "a stream");
    runtime.reset(nvinfer1::createInferRuntime(log));
    if (!runtime) fail("engine 'tensorrt'", "TensorRT's runtime");
  }
  ~Shared() {
    runtime.reset();
    cudaStreamDestroy(stream);
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  // The device is a setting of each thread, and calls may come from any.
  void enter(const std::string& where) const { check(cudaSetDevice(device), where, "the GPU that the session opened"); }

  [[noreturn]] void fail(const std::string& where, const char* wanted) const {
    throw Error(Kind::EngineError, where, "a refusal: " + log.last(), wanted,
                "the plan is for another device or library version", "run `quantempo build` on this device");
  }

  Log log;
  int device = 0;
  std::string capability;
  cudaStream_t stream = nullptr;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
};

// Device memory with a copy on the host.
class DeviceBuffer : public Buffer {
 public:
  DeviceBuffer(std::shared_ptr<const Shared> shared, const std::string& where, TensorSpec spec_, Shape shape_)
      : Buffer(std::move(spec_), std::move(shape_), where), shared_(std::move(shared)), where_(where) {
    check(cudaMalloc(&address, bytes == 0 ? 1 : bytes), where_, "device memory");
    push();
  }
  ~DeviceBuffer() override { cudaFree(address); }

  void push() override { copy(address, data, cudaMemcpyHostToDevice); }
  void pull() override { copy(data, address, cudaMemcpyDeviceToHost); }

  void* address = nullptr;

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    check(cudaMemcpyAsync(to, from, bytes, kind, shared_->stream), where_, "a copy");
    check(cudaStreamSynchronize(shared_->stream), where_, "a copy");
  }

  std::shared_ptr<const Shared> shared_;
  std::string where_;
};

class TensorRtEngine : public Engine {
 public:
  TensorRtEngine(std::shared_ptr<Shared> shared, const std::string& path, const EngineOptions& options)
      : shared_(std::move(shared)) {
    name = "tensorrt " + path.substr(path.rfind('/') + 1);
    std::map<std::string, std::string> given = options.settings;
    std::string target;
    if (const auto named = given.find("target"); named != given.end()) target = named->second, given.erase(named);
    if (!given.empty()) checked_settings(name, given, {{"target", {{"a target that was built"}}}});
    shared_->enter(name);
    const std::string version = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
                                std::to_string(NV_TENSORRT_PATCH) + "." + std::to_string(NV_TENSORRT_BUILD);
    const PlanFile plan = load_plan(path, target, shared_->capability, version);
    profiles_ = plan.profiles;
    auto tensors = graph_tensors(path);
    inputs = std::move(tensors.inputs);
    outputs = std::move(tensors.outputs);
    plan_.reset(shared_->runtime->deserializeCudaEngine(plan.bytes.data(), plan.bytes.size()));
    if (!plan_) shared_->fail(name, "a plan that the library loads");
  }

  std::unique_ptr<Binding> bind(const Sizes& sizes, const Buffers& share) override;

 private:
  friend class TensorRtBinding;
  std::shared_ptr<Shared> shared_;
  std::vector<PlanProfile> profiles_;
  std::unique_ptr<nvinfer1::ICudaEngine> plan_;
};

// An execution context with fixed shapes and addresses.
class TensorRtBinding : public Binding {
 public:
  TensorRtBinding(TensorRtEngine& engine, const Sizes& sizes, const Buffers& share) : engine_(engine) {
    const auto& shared = *engine.shared_;
    shared.enter(engine.name);
    context_.reset(engine.plan_->createExecutionContext());
    if (!context_) shared.fail(engine.name, "memory for an execution context");
    if (!context_->setOptimizationProfileAsync(choose_profile(engine.name, engine.profiles_, sizes), shared.stream)) {
      shared.fail(engine.name, "a profile of the plan");
    }
    const auto make = [&](const TensorSpec& spec, const Shape& shape) {
      return std::make_shared<DeviceBuffer>(engine.shared_, engine.name, spec, shape);
    };
    inputs = allocate_inputs(engine.name, engine.inputs, sizes, share, make);
    for (const auto& [tensor, buffer] : inputs) {
      if (context_->setInputShape(tensor.c_str(), dims(buffer->shape))) continue;
      shared.fail(engine.name, "shapes that the plan takes");
    }
    outputs = allocate(engine.name, engine.outputs, sizes, share, make);
    // An output may have a size that no input names; the context knows it once its inputs are set.
    for (const auto& spec : engine.outputs) {
      if (outputs.count(spec.name) != 0) continue;
      const nvinfer1::Dims known = context_->getTensorShape(spec.name.c_str());
      outputs[spec.name] = make(spec, Shape(known.d, known.d + std::max(0, known.nbDims)));
    }
    for (const auto* side : {&inputs, &outputs}) {
      for (const auto& [tensor, buffer] : *side) {
        auto* on_device = dynamic_cast<DeviceBuffer*>(buffer.get());
        if (on_device == nullptr || !context_->setTensorAddress(tensor.c_str(), on_device->address)) {
          shared.fail(engine.name, "memory of the device");
        }
      }
    }
    check(cudaStreamSynchronize(shared.stream), engine.name, "a profile of the plan");
  }

  void run() override {
    const auto& shared = *engine_.shared_;
    shared.enter(engine_.name);
    if (!context_->enqueueV3(shared.stream)) shared.fail(engine_.name, "a call that runs");
    check(cudaStreamSynchronize(shared.stream), engine_.name, "a call that runs");
  }

 private:
  nvinfer1::Dims dims(const Shape& shape) const {
    nvinfer1::Dims made{};
    if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) engine_.shared_->fail(engine_.name, "a rank of at most 8");
    made.nbDims = static_cast<std::int32_t>(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) made.d[i] = shape[i];
    return made;
  }

  TensorRtEngine& engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

std::unique_ptr<Binding> TensorRtEngine::bind(const Sizes& sizes, const Buffers& share) {
  return std::make_unique<TensorRtBinding>(*this, sizes, share);
}

class TensorRtBackend : public Backend {
 public:
  explicit TensorRtBackend(EngineOptions options) : options_(std::move(options)), shared_(std::make_shared<Shared>()) {}

  std::vector<std::string> dialects() const override { return {"fp8", "portable", "float"}; }

  std::unique_ptr<Engine> open(const std::string& path, const std::string&) override {
    return std::make_unique<TensorRtEngine>(shared_, path, options_);
  }

 private:
  EngineOptions options_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace
}  // namespace tensorrt

std::unique_ptr<Backend> open_tensorrt(const EngineOptions& options) {
  return std::make_unique<tensorrt::TensorRtBackend>(options);
}

}  // namespace quantempo::runtime
