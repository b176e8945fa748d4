// The backends that a build may have; CMake says which.
#pragma once

#include <memory>

#include "../engine.hpp"

namespace quantempo::runtime {

std::unique_ptr<Backend> open_ort(const EngineOptions& options);
std::unique_ptr<Backend> open_openvino(const EngineOptions& options);
std::unique_ptr<Backend> open_tensorrt(const EngineOptions& options);

}  // namespace quantempo::runtime
