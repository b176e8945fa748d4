// A device without a GPU, for the tests of the TensorRT backend.
//
// Device memory has addresses that nobody can read, and is found by them alone.  A stream does nothing before somebody
// waits for it.  A plan is the path of an ONNX file, which ONNX Runtime runs (FAKE_ORT_LIBRARY).  FAKE_FAILS names what
// fails: gpu, plan, memory, context, profile, run.
#include <NvInferRuntime.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/backends.hpp"

namespace rt = quantempo::runtime;

namespace {

std::map<const void*, std::vector<char>> device;
std::vector<std::function<void()>> waiting;
thread_local int current = 0;

bool fails(const char* what) {
  const char* given = std::getenv("FAKE_FAILS");
  return given != nullptr && std::strcmp(given, what) == 0;
}

std::vector<char>* on_device(const void* address) {
  const auto found = device.find(address);
  return found == device.end() ? nullptr : &found->second;
}

}  // namespace

struct CUstream_st {};

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoDevice ? "no CUDA-capable device is detected"
         : error == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}
cudaError_t cudaGetDevice(int* number) {
  *number = 3;  // of several: each thread has to choose it
  return fails("gpu") ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  current = number;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {8, 9};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  auto work = std::move(waiting);
  waiting.clear();
  for (const auto& each : work) each();
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  static std::uintptr_t next = 256;
  if (current != 3) return cudaErrorInvalidValue;
  if (fails("memory")) return cudaErrorMemoryAllocation;
  *address = reinterpret_cast<void*>(next);
  next += 256;
  device[*address].assign(bytes, static_cast<char>(0xa5));  // as memory of a device is: not zeros
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  return address == nullptr || device.erase(address) == 1 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  const auto* memory = on_device(kind == cudaMemcpyHostToDevice ? to : from);
  if (memory == nullptr || memory->size() < bytes) return cudaErrorInvalidValue;
  waiting.emplace_back([=] {
    if (kind == cudaMemcpyHostToDevice) std::memcpy(device.at(to).data(), from, bytes);
    else std::memcpy(to, device.at(from).data(), bytes);
  });
  return cudaSuccess;
}

namespace {

class Context : public nvinfer1::IExecutionContext {
 public:
  explicit Context(rt::Engine& engine) : engine_(engine) {}

  bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept override {
    chosen_ = profile >= 0 && profile < 2 && !fails("profile");
    return chosen_;
  }
  bool setInputShape(const char* tensor, const nvinfer1::Dims& dims) noexcept override {
    const rt::TensorSpec* spec = engine_.input(tensor);
    if (!chosen_ || spec == nullptr || static_cast<std::size_t>(dims.nbDims) != spec->shape.size()) return false;
    for (std::size_t i = 0; i < spec->shape.size(); ++i) {
      const auto* symbol = std::get_if<std::string>(&spec->shape[i]);
      if (symbol != nullptr) sizes_[*symbol] = dims.d[i];
      else if (std::get<std::int64_t>(spec->shape[i]) != dims.d[i]) return false;
    }
    return true;
  }
  nvinfer1::Dims getTensorShape(const char*) const noexcept override { return {-1, {}}; }
  bool setTensorAddress(const char* tensor, void* address) noexcept override {
    addresses_[tensor] = address;
    return on_device(address) != nullptr;
  }
  bool enqueueV3(cudaStream_t) noexcept override {
    if (fails("run") || current != 3 || addresses_.size() != engine_.inputs.size() + engine_.outputs.size()) return false;
    waiting.emplace_back([this] { compute(); });
    return true;
  }

 private:
  void compute() {
    const auto binding = engine_.bind(sizes_, {});
    for (const auto& [tensor, buffer] : binding->inputs) {
      std::memcpy(buffer->data, device.at(addresses_.at(tensor)).data(), buffer->bytes);
    }
    binding->run();
    for (const auto& [tensor, buffer] : binding->outputs) {
      std::memcpy(device.at(addresses_.at(tensor)).data(), buffer->data, buffer->bytes);
    }
  }

  rt::Engine& engine_;
  bool chosen_ = false;
  rt::Sizes sizes_;
  std::map<std::string, void*> addresses_;
};

class Plan : public nvinfer1::ICudaEngine {
 public:
  explicit Plan(const std::string& path) {
    rt::EngineOptions options;
    options.library = std::getenv("FAKE_ORT_LIBRARY");
    options.threads = 1;
    backend_ = rt::open_ort(options);
    engine_ = backend_->open(path, "float");
  }
  nvinfer1::IExecutionContext* createExecutionContext() noexcept override {
    return fails("context") ? nullptr : new Context(*engine_);
  }

 private:
  std::unique_ptr<rt::Backend> backend_;
  std::unique_ptr<rt::Engine> engine_;
};

class Runtime : public nvinfer1::IRuntime {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {}

  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t bytes) noexcept override {
    if (!fails("plan")) return new Plan(std::string(static_cast<const char*>(plan), bytes));
    logger_.log(nvinfer1::ILogger::Severity::kERROR, "the plan has another magic tag");
    logger_.log(nvinfer1::ILogger::Severity::kWARNING, "no reason to stop");
    return nullptr;
  }

 private:
  nvinfer1::ILogger& logger_;
};

}  // namespace

nvinfer1::IRuntime* nvinfer1::createInferRuntime(ILogger& logger) noexcept { return new Runtime(logger); }
