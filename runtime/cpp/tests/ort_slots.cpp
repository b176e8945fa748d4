// Proves at compile time that the positions in ort_api.hpp are those of ONNX Runtime's header.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "backends/ort_api.hpp"

#define SAME(name)                                                                                     \
  static_assert(offsetof(OrtApi, name) == quantempo::runtime::ort::name::position * sizeof(void*), #name)

static_assert(ORT_API_VERSION >= quantempo::runtime::ort::kApiVersion, "an older header than the backend asks for");
SAME(GetErrorMessage);
SAME(CreateEnv);
SAME(DisableTelemetryEvents);
SAME(CreateSession);
SAME(Run);
SAME(CreateSessionOptions);
SAME(SetSessionLogSeverityLevel);
SAME(SetSessionGraphOptimizationLevel);
SAME(SetIntraOpNumThreads);
SAME(SetInterOpNumThreads);
SAME(SessionGetInputCount);
SAME(SessionGetOutputCount);
SAME(SessionGetInputTypeInfo);
SAME(SessionGetOutputTypeInfo);
SAME(SessionGetInputName);
SAME(SessionGetOutputName);
SAME(CreateTensorWithDataAsOrtValue);
SAME(CastTypeInfoToTensorInfo);
SAME(GetTensorElementType);
SAME(GetDimensionsCount);
SAME(GetDimensions);
SAME(GetSymbolicDimensions);
SAME(GetTensorTypeAndShape);
SAME(CreateCpuMemoryInfo);
SAME(AllocatorFree);
SAME(GetAllocatorWithDefaultOptions);
SAME(ReleaseEnv);
SAME(ReleaseStatus);
SAME(ReleaseMemoryInfo);
SAME(ReleaseSession);
SAME(ReleaseValue);
SAME(ReleaseTypeInfo);
SAME(ReleaseTensorTypeAndShapeInfo);
SAME(ReleaseSessionOptions);
SAME(AddSessionConfigEntry);
SAME(RunWithBinding);
SAME(CreateIoBinding);
SAME(ReleaseIoBinding);
SAME(BindInput);
SAME(BindOutput);
SAME(CreateAndRegisterAllocator);
SAME(AddInitializer);
SAME(CreatePrepackedWeightsContainer);
SAME(ReleasePrepackedWeightsContainer);
SAME(CreateSessionWithPrepackedWeightsContainer);
