// The backends that a build may have; CMake says which.
#pragma once

#include <memory>

#include "../engine.hpp"

namespace quantempo::runtime {

// Whether a dialect is FP8, which no CPU computes: says then that it is simulated.
bool simulates_fp8(const std::string& where, const std::string& dialect, const EngineOptions& options);

std::unique_ptr<Backend> open_ort(const EngineOptions& options);
std::unique_ptr<Backend> open_openvino(const EngineOptions& options);
std::unique_ptr<Backend> open_tensorrt(const EngineOptions& options);

}  // namespace quantempo::runtime
