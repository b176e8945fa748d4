// Proves at compile time that the positions in ort_api.hpp are those of ONNX Runtime's header, and that its functions
// take and return there what the backend passes and expects.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "backends/ort_api.hpp"

// The attributes of the header's functions say what to do with a status, not how to call.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace {

// Values that are passed alike: objects are opaque in the backend, and enumerations are integers of their size.
template <typename A, typename B>
constexpr bool alike() {
  if (std::is_void_v<A> || std::is_void_v<B>) return std::is_void_v<A> && std::is_void_v<B>;
  if (std::is_pointer_v<A> || std::is_pointer_v<B>) return std::is_pointer_v<A> && std::is_pointer_v<B>;
  const bool integers = (std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>);
  if constexpr (std::is_void_v<A> || std::is_void_v<B>) return false;
  else return integers && sizeof(A) == sizeof(B);
}

template <typename Ours, typename Theirs>
struct Called : std::false_type {};
template <typename R, typename... A, typename S, typename... B>
struct Called<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) == sizeof...(B)) return alike<R, S>() && (alike<A, B>() && ...);
    else return false;
  }();
};
template <typename R, typename... A, typename S, typename... B>
struct Called<R (*)(A...), S (*)(B...) noexcept> : Called<R (*)(A...), S (*)(B...)> {};

static_assert(Called<int (*)(const int*, long), int (*)(void*, unsigned long)>::value);
static_assert(!Called<int (*)(const int*), int (*)(void*, unsigned long)>::value);
static_assert(!Called<int (*)(const int*), int (*)(long)>::value);
static_assert(!Called<void (*)(int*), int* (*)(int*)>::value);

}  // namespace

#define SAME(name)                                                                                              \
  static_assert(offsetof(OrtApi, name) == quantempo::runtime::ort::name::position * sizeof(void*), #name);      \
  static_assert(Called<quantempo::runtime::ort::name::Pointer, decltype(OrtApi::name)>::value, #name)

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
