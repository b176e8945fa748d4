// As much of TensorRT's runtime interface as the backend uses; tests/tensorrt/device.cpp runs plans on ONNX Runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 13
#define NV_TENSORRT_PATCH 3
#define NV_TENSORRT_BUILD 0

namespace nvinfer1 {

struct Dims {
  static constexpr std::int32_t MAX_DIMS{8};
  std::int32_t nbDims;
  std::int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  virtual bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept = 0;
  virtual bool setInputShape(const char* tensor, const Dims& dims) noexcept = 0;
  virtual Dims getTensorShape(const char* tensor) const noexcept = 0;
  virtual bool setTensorAddress(const char* tensor, void* address) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  virtual IExecutionContext* createExecutionContext() noexcept = 0;
};

class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  virtual ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t bytes) noexcept = 0;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
