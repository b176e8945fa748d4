// Whether this CPU multiplies 8-bit integers without loss.
#pragma once

#include <string>

namespace quantempo::runtime {

// False on an x86 without VNNI or AMX, where two products of U8 and S8 are added into 16 bits and saturate.
bool exact_integers();

// Why a graph's INT8 weights are unsafe on such a CPU; empty where they are safe.  Throws `EngineError`.
std::string saturation_reason(const std::string& graph);

}  // namespace quantempo::runtime
