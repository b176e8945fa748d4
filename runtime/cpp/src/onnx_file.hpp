// The little of the ONNX file format that opening a graph needs.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include "tensors.hpp"

namespace quantempo::runtime {

// A weight of the main graph that lies in a file of its own.
struct ExternalTensor {
  std::string name, dtype, location;
  Shape shape;
  std::size_t offset = 0;
  // The operators that compute with it: what it is dequantized, cast or reshaped into counts as itself.
  std::set<std::string> consumers;
};

// Refuses a graph whose weight files lie outside its folder, are missing, or are reached through a link.
void check_external_files(const std::string& graph);

// The inputs (without weights) and outputs of a graph, symbols as the file names them; a size without a name gets one of
// its own.  Throws `EngineError` for a type that the runtime does not have.
struct GraphTensors {
  std::vector<TensorSpec> inputs, outputs;
};
GraphTensors graph_tensors(const std::string& graph);

// Weights in files beside the graph; those of subgraphs are left to the engine.  Throws `EngineError`.
std::vector<ExternalTensor> external_tensors(const std::string& graph);

// The same three questions for the bytes of a graph; `external_locations` has every location that it names, in subgraphs
// too.  They throw `std::runtime_error` where the bytes are no protobuf message.
std::vector<std::string> external_locations(const unsigned char* bytes, std::size_t size);
std::vector<ExternalTensor> external_tensors(const unsigned char* bytes, std::size_t size);
GraphTensors graph_tensors(const unsigned char* bytes, std::size_t size, const std::string& shown_as);

}  // namespace quantempo::runtime
