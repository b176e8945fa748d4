// A protobuf message is a list of (field number, wire type, value); the walk skips what it does not need by length.
// Field numbers are those of onnx.proto.
#include "onnx_file.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <stdexcept>
#include <string_view>

#include "error.hpp"
#include "files.hpp"

namespace quantempo::runtime {

namespace {

struct Span {
  const unsigned char* begin;
  const unsigned char* end;

  std::string text() const { return std::string(reinterpret_cast<const char*>(begin), static_cast<std::size_t>(end - begin)); }
};

struct Field {
  std::uint64_t number = 0, value = 0;  // `value` of a varint
  bool bytes = false;
  Span span{nullptr, nullptr};
};

std::uint64_t varint(Span& at) {
  std::uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (at.begin == at.end) throw std::runtime_error("a number that is cut short");
    const unsigned char byte = *at.begin++;
    value |= std::uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return value;
  }
  throw std::runtime_error("a number of more than 64 bits");
}

// Reads the next field; false at the end.
bool next(Span& at, Field& field) {
  if (at.begin == at.end) return false;
  const std::uint64_t tag = varint(at);
  field = Field{};
  field.number = tag >> 3;
  const auto left = [&] { return static_cast<std::uint64_t>(at.end - at.begin); };
  switch (tag & 7) {
    case 0:
      field.value = varint(at);
      return true;
    case 2: {
      const std::uint64_t length = varint(at);
      if (length > left()) throw std::runtime_error("a field that ends after its message");
      field.bytes = true;
      field.span = {at.begin, at.begin + length};
      at.begin += length;
      return true;
    }
    case 1:
    case 5: {
      const std::uint64_t length = (tag & 7) == 1 ? 8 : 4;
      if (length > left()) throw std::runtime_error("a field that ends after its message");
      at.begin += length;
      return true;
    }
    default:
      throw std::runtime_error("wire type " + std::to_string(tag & 7));
  }
}

std::vector<Span> children(Span at, std::uint64_t number) {
  std::vector<Span> found;
  for (Field field; next(at, field);) {
    if (field.bytes && field.number == number) found.push_back(field.span);
  }
  return found;
}

std::size_t decimal(const std::string& text) {
  if (text.empty()) return 0;
  if (text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) {
    throw std::runtime_error("external data at " + repr(text));
  }
  return static_cast<std::size_t>(std::stoull(text));
}

const char* type_name(std::uint64_t number) {
  static constexpr std::array<const char*, 17> names = {"",       "float32", "uint8",   "int8",   "uint16", "int16",
                                                        "int32",  "int64",   "",        "bool",   "float16", "float64",
                                                        "uint32", "uint64",  "",        "",       "bfloat16"};
  return number < names.size() ? names[number] : "";
}

// A TensorProto; `location` stays empty where the values lie in the graph file itself.
ExternalTensor read_tensor(Span at) {
  ExternalTensor tensor;
  for (Field field; next(at, field);) {
    if (field.number == 1 && field.bytes) {
      for (Span packed = field.span; packed.begin != packed.end;) {
        tensor.shape.push_back(static_cast<std::int64_t>(varint(packed)));
      }
    } else if (field.number == 1) {
      tensor.shape.push_back(static_cast<std::int64_t>(field.value));
    } else if (field.number == 2) {
      tensor.dtype = type_name(field.value);
    } else if (field.number == 8 && field.bytes) {
      tensor.name = field.span.text();
    } else if (field.number == 13 && field.bytes) {
      std::string key, value;
      Span entry = field.span;
      for (Field part; next(entry, part);) {
        if (part.bytes && part.number == 1) key = part.span.text();
        if (part.bytes && part.number == 2) value = part.span.text();
      }
      if (key == "location") tensor.location = value;
      if (key == "offset") tensor.offset = decimal(value);
    }
  }
  return tensor;
}

// Which nodes read a tensor, by its name: the node's operator, and the outputs of those that only change the form.
struct Use {
  std::string op;
  std::vector<std::string> outputs;
};
using Uses = std::map<std::string, std::vector<Use>>;

// Uses in a subgraph count as uses by the node that holds it.
void read_inner_uses(std::vector<Span> pending, const std::string& op, Uses& uses) {
  while (!pending.empty()) {
    const Span graph = pending.back();
    pending.pop_back();
    for (const Span node : children(graph, 1)) {
      for (const Span input : children(node, 1)) uses[input.text()].push_back({op, {}});
      for (const Span attribute : children(node, 5)) {
        for (const std::uint64_t kind : {6u, 11u}) {
          for (const Span inner : children(attribute, kind)) pending.push_back(inner);
        }
      }
    }
  }
}

Uses read_uses(Span graph) {
  static const std::set<std::string> forms = {"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"};
  Uses uses;
  for (const Span node : children(graph, 1)) {
    const auto types = children(node, 4);
    Use use{types.empty() ? "" : types.back().text(), {}};
    if (forms.count(use.op) != 0) {
      for (const Span output : children(node, 2)) use.outputs.push_back(output.text());
    }
    for (const Span input : children(node, 1)) uses[input.text()].push_back(use);
    std::vector<Span> inner;
    for (const Span attribute : children(node, 5)) {
      for (const std::uint64_t kind : {6u, 11u}) {
        for (const Span graph_inside : children(attribute, kind)) inner.push_back(graph_inside);
      }
    }
    read_inner_uses(std::move(inner), use.op, uses);
  }
  return uses;
}

std::set<std::string> consumers_of(const Uses& uses, const std::string& tensor) {
  std::set<std::string> found, seen = {tensor};
  std::vector<std::string> pending = {tensor};
  while (!pending.empty()) {
    const auto used = uses.find(pending.back());
    pending.pop_back();
    if (used == uses.end()) continue;
    for (const Use& use : used->second) {
      if (use.outputs.empty()) found.insert(use.op);
      for (const auto& output : use.outputs) {
        if (seen.insert(output).second) pending.push_back(output);
      }
    }
  }
  return found;
}

// The weight files of a graph and all its subgraphs.
void collect(std::vector<Span> pending, std::set<std::string>& names) {
  while (!pending.empty()) {
    const Span graph = pending.back();
    pending.pop_back();
    std::vector<Span> tensors = children(graph, 5);
    for (const Span node : children(graph, 1)) {
      for (const Span attribute : children(node, 5)) {
        for (const Span tensor : children(attribute, 5)) tensors.push_back(tensor);
        for (const Span inner : children(attribute, 6)) pending.push_back(inner);
        for (const Span inner : children(attribute, 11)) pending.push_back(inner);
      }
    }
    for (const Span tensor : tensors) {
      for (const Span entry : children(tensor, 13)) {
        const auto keys = children(entry, 1), values = children(entry, 2);
        if (!keys.empty() && keys.back().text() == "location") names.insert(values.empty() ? "" : values.back().text());
      }
    }
  }
}

// A ValueInfoProto.  Its type is TypeProto.tensor_type: element type, and a shape of sizes or symbols.
TensorSpec read_value(Span at) {
  TensorSpec spec;
  for (const Span name : children(at, 1)) spec.name = name.text();
  for (const Span type : children(at, 2)) {
    for (Span tensor : children(type, 1)) {
      for (const Span shape : children(tensor, 2)) {
        for (Span dimension : children(shape, 1)) {
          Dimension size = spec.name + "." + std::to_string(spec.shape.size());
          for (Field field; next(dimension, field);) {
            if (field.number == 1 && !field.bytes) size = static_cast<std::int64_t>(field.value);
            if (field.number == 2 && field.bytes && field.span.begin != field.span.end) size = field.span.text();
          }
          spec.shape.push_back(std::move(size));
        }
      }
      for (Field field; next(tensor, field);) {
        if (field.number == 1 && !field.bytes) spec.dtype = type_name(field.value);
      }
    }
  }
  return spec;
}

[[noreturn]] void not_onnx(const std::string& graph, const std::string& found) {
  throw Error(Kind::EngineError, graph, found, "an ONNX graph file", "a wrong path, or a file that was cut short",
              "compile the bundle again");
}

std::vector<Span> main_graphs(const unsigned char* bytes, std::size_t size) {
  auto graphs = children({bytes, bytes + size}, 7);
  if (graphs.empty()) throw std::runtime_error("no graph in it");
  return graphs;
}

// Calls `read` with the bytes of a graph file.
template <typename Read>
void with_bytes(const std::string& graph, const Read& read) {
  try {
    const MappedFile file(graph);
    read(file.data(), file.size());
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& error) {
    not_onnx(graph, error.what());
  }
}

void check_location(const std::string& graph, const std::string& folder, const std::string& name) {
  const std::string where = graph.substr(folder.size()) + ": external data";
  bool plain = !name.empty() && name.front() != '/' && name.find_first_of(std::string("\\:\0", 3)) == std::string::npos;
  for (std::size_t start = 0; plain && start <= name.size();) {
    const auto end = std::min(name.find('/', start), name.size());
    plain = std::string_view(name).substr(start, end - start) != "..";
    start = end + 1;
  }
  if (!plain) {
    throw Error(Kind::UnsafePath, where, "location " + repr(name), "a path below the graph's folder",
                "the graph was made or changed by somebody else's tool", "do not use this graph");
  }
  std::size_t end = 0;
  do {
    end = name.find('/', end + 1);
    if (file_type(folder + name.substr(0, end)) == FileType::Link) {
      throw Error(Kind::UnsafePath, where, repr(name) + " is a link", "a plain file",
                  "the folder was put together by hand", "copy the file to where the link is");
    }
  } while (end != std::string::npos);
  if (file_type(folder + name) != FileType::Regular) {
    throw Error(Kind::EngineError, where, "no file " + repr(name), "it next to " + graph.substr(folder.size()),
                "the graph was copied without its weights", "copy the weight file as well");
  }
}

}  // namespace

std::vector<std::string> external_locations(const unsigned char* bytes, std::size_t size) {
  std::set<std::string> names;
  collect(main_graphs(bytes, size), names);
  return {names.begin(), names.end()};
}

std::vector<ExternalTensor> external_tensors(const unsigned char* bytes, std::size_t size) {
  std::vector<ExternalTensor> found;
  for (const Span graph : main_graphs(bytes, size)) {
    const Uses uses = read_uses(graph);
    for (const Span tensor : children(graph, 5)) {
      ExternalTensor read = read_tensor(tensor);
      if (read.location.empty()) continue;
      read.consumers = consumers_of(uses, read.name);
      found.push_back(std::move(read));
    }
  }
  return found;
}

GraphTensors graph_tensors(const unsigned char* bytes, std::size_t size, const std::string& shown_as) {
  GraphTensors found;
  for (const Span part : main_graphs(bytes, size)) {
    std::set<std::string> weights;
    for (const Span tensor : children(part, 5)) weights.insert(read_tensor(tensor).name);
    for (const Span value : children(part, 11)) {
      TensorSpec spec = read_value(value);
      if (weights.count(spec.name) == 0) found.inputs.push_back(std::move(spec));
    }
    for (const Span value : children(part, 12)) found.outputs.push_back(read_value(value));
  }
  for (const auto* side : {&found.inputs, &found.outputs}) {
    for (const auto& spec : *side) {
      if (element_size(spec.dtype) != 0) continue;
      throw Error(Kind::EngineError, shown_as + ": tensor " + repr(spec.name),
                  "type " + (spec.dtype.empty() ? std::string("unknown") : spec.dtype), "float, integers or bool",
                  "the runtime has no such type", "cast to float32 inside the graph");
    }
  }
  return found;
}

GraphTensors graph_tensors(const std::string& graph) {
  GraphTensors found;
  with_bytes(graph, [&](const unsigned char* bytes, std::size_t size) {
    found = graph_tensors(bytes, size, graph.substr(graph.rfind('/') + 1));
  });
  return found;
}

void check_external_files(const std::string& graph) {
  const std::string folder = graph.substr(0, graph.rfind('/') + 1);
  with_bytes(graph, [&](const unsigned char* bytes, std::size_t size) {
    for (const auto& name : external_locations(bytes, size)) check_location(graph, folder, name);
  });
}

std::vector<ExternalTensor> external_tensors(const std::string& graph) {
  std::vector<ExternalTensor> found;
  with_bytes(graph, [&](const unsigned char* bytes, std::size_t size) { found = external_tensors(bytes, size); });
  return found;
}

}  // namespace quantempo::runtime
