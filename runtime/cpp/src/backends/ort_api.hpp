// The part of ONNX Runtime's C API that the backend uses, by position: the API is one table of functions whose order
// never changes from version to version.  So no header of the library is needed to build.  Where headers are found,
// tests/ort_slots.cpp proves the positions against them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../error.hpp"

namespace quantempo::runtime::ort {

// Opaque objects of the library.
struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct MemoryInfo;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct IoBinding;
struct Allocator;
struct Prepacked;

struct ApiBase {
  const void* const* (*get_api)(std::uint32_t version);
  const char* (*version)();
};

inline constexpr std::uint32_t kApiVersion = 18;  // of ONNX Runtime 1.18, the oldest that opens a bundle's graphs; later ones carry it too

// A function at its position in the table.
template <std::size_t Position, typename Function>
struct Slot;
template <std::size_t Position, typename Result, typename... Arguments>
struct Slot<Position, Result(Arguments...)> {
  static constexpr std::size_t position = Position;
  using Pointer = Result (*)(Arguments...);
};

using GetErrorMessage = Slot<2, const char*(const Status*)>;
using CreateEnv = Slot<3, Status*(int level, const char* name, Env**)>;
using DisableTelemetryEvents = Slot<6, Status*(const Env*)>;
using CreateSession = Slot<7, Status*(const Env*, const char* path, const SessionOptions*, Session**)>;
using Run = Slot<9, Status*(Session*, const void* options, const char* const* inputs, const Value* const* values,
                            std::size_t count, const char* const* outputs, std::size_t outputs_count, Value** results)>;
using CreateSessionOptions = Slot<10, Status*(SessionOptions**)>;
using SetSessionLogSeverityLevel = Slot<22, Status*(SessionOptions*, int)>;
using SetSessionGraphOptimizationLevel = Slot<23, Status*(SessionOptions*, int)>;
using SetIntraOpNumThreads = Slot<24, Status*(SessionOptions*, int)>;
using SetInterOpNumThreads = Slot<25, Status*(SessionOptions*, int)>;
using SessionGetInputCount = Slot<30, Status*(const Session*, std::size_t*)>;
using SessionGetOutputCount = Slot<31, Status*(const Session*, std::size_t*)>;
using SessionGetInputTypeInfo = Slot<33, Status*(const Session*, std::size_t, TypeInfo**)>;
using SessionGetOutputTypeInfo = Slot<34, Status*(const Session*, std::size_t, TypeInfo**)>;
using SessionGetInputName = Slot<36, Status*(const Session*, std::size_t, Allocator*, char**)>;
using SessionGetOutputName = Slot<37, Status*(const Session*, std::size_t, Allocator*, char**)>;
using CreateTensorWithDataAsOrtValue = Slot<49, Status*(const MemoryInfo*, void* data, std::size_t bytes,
                                                        const std::int64_t* shape, std::size_t rank, int type, Value**)>;
using CastTypeInfoToTensorInfo = Slot<55, Status*(const TypeInfo*, const TensorInfo**)>;
using GetTensorElementType = Slot<60, Status*(const TensorInfo*, int*)>;
using GetDimensionsCount = Slot<61, Status*(const TensorInfo*, std::size_t*)>;
using GetDimensions = Slot<62, Status*(const TensorInfo*, std::int64_t*, std::size_t)>;
using GetSymbolicDimensions = Slot<63, Status*(const TensorInfo*, const char**, std::size_t)>;
using GetTensorTypeAndShape = Slot<65, Status*(const Value*, TensorInfo**)>;
using CreateCpuMemoryInfo = Slot<69, Status*(int allocator, int type, MemoryInfo**)>;
using AllocatorFree = Slot<76, Status*(Allocator*, void*)>;
using GetAllocatorWithDefaultOptions = Slot<78, Status*(Allocator**)>;
using ReleaseEnv = Slot<92, void(Env*)>;
using ReleaseStatus = Slot<93, void(Status*)>;
using ReleaseMemoryInfo = Slot<94, void(MemoryInfo*)>;
using ReleaseSession = Slot<95, void(Session*)>;
using ReleaseValue = Slot<96, void(Value*)>;
using ReleaseTypeInfo = Slot<98, void(TypeInfo*)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(TensorInfo*)>;
using ReleaseSessionOptions = Slot<100, void(SessionOptions*)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions*, const char* key, const char* value)>;
using RunWithBinding = Slot<133, Status*(Session*, const void* options, const IoBinding*)>;
using CreateIoBinding = Slot<134, Status*(Session*, IoBinding**)>;
using ReleaseIoBinding = Slot<135, void(IoBinding*)>;
using BindInput = Slot<136, Status*(IoBinding*, const char* name, const Value*)>;
using BindOutput = Slot<137, Status*(IoBinding*, const char* name, const Value*)>;
using CreateAndRegisterAllocator = Slot<144, Status*(Env*, const MemoryInfo*, const void* arena)>;
using AddInitializer = Slot<150, Status*(SessionOptions*, const char* name, const Value*)>;
using CreatePrepackedWeightsContainer = Slot<166, Status*(Prepacked**)>;
using ReleasePrepackedWeightsContainer = Slot<167, void(Prepacked*)>;
using CreateSessionWithPrepackedWeightsContainer =
    Slot<168, Status*(const Env*, const char* path, const SessionOptions*, Prepacked*, Session**)>;

// The opened library.
class Api {
 public:
  explicit Api(const std::string& library);

  template <typename Function, typename... Arguments>
  auto raw(Arguments... arguments) const {
    return reinterpret_cast<typename Function::Pointer>(const_cast<void*>(table_[Function::position]))(arguments...);
  }

  // Calls a function that reports a status; its refusal becomes an `EngineError` with the library's own words.
  template <typename Function, typename... Arguments>
  void call(const std::string& where, const char* wanted, Arguments... arguments) const {
    if (Status* status = raw<Function>(arguments...)) refuse(where, wanted, status);
  }

  const std::string& version() const { return version_; }

 private:
  [[noreturn]] void refuse(const std::string& where, const char* wanted, Status* status) const;

  const void* const* table_ = nullptr;
  std::string version_;
};

// Owns an object of the library.
template <typename Object, typename Release>
class Held {
 public:
  explicit Held(const Api& api) : api_(&api) {}
  ~Held() {
    if (object_ != nullptr) api_->raw<Release>(object_);
  }
  Held(Held&& other) noexcept : api_(other.api_), object_(other.object_) { other.object_ = nullptr; }
  Held& operator=(Held&&) = delete;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  Object* get() const { return object_; }
  Object** out() { return &object_; }

 private:
  const Api* api_;
  Object* object_ = nullptr;
};

}  // namespace quantempo::runtime::ort
