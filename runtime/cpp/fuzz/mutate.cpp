#include "mutate.hpp"

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

namespace {

using Json = nlohmann::json;

constexpr std::size_t kMostNodes = 4000;

// Words that mean something somewhere, and numbers at the edges.
const std::vector<Json>& values() {
  static const std::vector<Json> known = {
      nullptr, true, false, 0, 1, -1, 2, 3, 4, 255, 1 << 20, 4294967295u, 4294967296, INT64_MAX, INT64_MIN, UINT64_MAX, 0.5,
      -0.5, 1e308, -1e-308, 1.0, "", "latents", "prediction", "r1", "full", "reuse.0", "reuse.1", "probe", "indicator",
      "sample", "timestep", "class_labels", "scale_group", "cache.0", "cache.0.gain", "gain", "bias", "lin", "clamp",
      "noise", "correct", "batch", "float32", "int64", "F32", "I32", "F64", "BOOL", "../x", "/x", "graphs/x", "graphs/a.onnx",
      "float", "ort", "last_refresh", "previous_call", "corrections-1", "feature-cache-1", "step-program-1", "4", "04",
      "tensorrt", "tensorrt_rtx", "plan", "refit", "bundle", "8.9", "full.portable-f16", "full.float-f32", "portable",
      Json::array(), Json::object(), Json::array({"latents", 1.0}), Json::array({"cache.0", 0.5})};
  return known;
}

const std::vector<std::string>& keys() {
  static const std::vector<std::string> known = {
      "kind", "to", "terms", "source", "low", "high", "draw", "gain", "bias", "row", "timestep", "inputs", "update", "step",
      "group_key", "graph", "vectors", "decide", "probe", "threshold", "refresh", "polynomial", "accumulate", "reference",
      "max_consecutive", "state", "name", "initial_scale", "scheduler", "steps", "calls", "eta", "version", "options",
      "dtype", "shape", "data_offsets", "sample", "requires", "files", "graphs", "denoiser", "decoder", "programs",
      "partition", "cache", "reads", "writes", "outputs", "latents_shape", "cache.0.gain", "__metadata__", "manifest", "program", "target",
      "backend", "library", "capability", "plans", "file", "entry", "plan_size", "parts", "profiles", "weights", "sizes",
      "low", "best", "high", "batch", "requires", "precision"};
  return known;
}

void collect(Json& node, std::vector<Json*>& found) {
  if (found.size() >= kMostNodes) return;
  found.push_back(&node);
  if (node.is_structured()) {
    for (auto& child : node) collect(child, found);
  }
}

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  std::mt19937& random() { return random_; }
  std::size_t below(std::size_t limit) { return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_); }

  void change(Json& document) {
    std::vector<Json*> nodes;
    collect(document, nodes);
    Json& node = *nodes[below(nodes.size())];
    switch (below(7)) {
      case 0:
        node = values()[below(values().size())];
        break;
      case 1: {
        const Json copy = *nodes[below(nodes.size())];
        node = copy;
        break;
      }
      case 2:
        if (node.is_object() && !node.empty()) node.erase(pick(node));
        if (node.is_array() && !node.empty()) node.erase(below(node.size()));
        break;
      case 3:
        if (node.is_object()) node[keys()[below(keys().size())]] = values()[below(values().size())];
        if (node.is_array()) {
          const Json copy = node.empty() ? values()[below(values().size())] : node[below(node.size())];
          node.insert(node.begin() + static_cast<std::ptrdiff_t>(below(node.size() + 1)), copy);
        }
        break;
      case 4:
        if (node.is_number_integer()) node = node.get<std::int64_t>() / 2 + static_cast<std::int64_t>(below(7)) - 3;
        if (node.is_number_float()) node = node.get<double>() * (static_cast<double>(below(9)) - 4.0);
        break;
      case 5:
        if (node.is_object() && !node.empty()) {
          const std::string key = pick(node);
          const Json value = node[key];
          node.erase(key);
          node[keys()[below(keys().size())]] = value;
        }
        break;
      default:
        if (node.is_array() && node.size() > 1) std::swap(node[below(node.size())], node[below(node.size())]);
    }
  }

 private:
  std::string pick(const Json& object) {
    auto at = object.begin();
    std::advance(at, below(object.size()));
    return at.key();
  }

  std::mt19937 random_;
};

// The JSON inside a document, or nothing; `safetensors` has it behind eight bytes of length.
bool parse(const std::string& document, bool safetensors, Json& json, std::string& rest) {
  std::string text = document;
  if (safetensors) {
    if (document.size() < 8) return false;
    std::uint64_t length = 0;
    std::memcpy(&length, document.data(), 8);
    if (length > document.size() - 8) return false;
    text = document.substr(8, length);
    rest = document.substr(8 + length);
  }
  json = Json::parse(text, nullptr, false);
  return !json.is_discarded();
}

}  // namespace

int kind_of(const std::uint8_t* data) {
  static const char* const fixed = std::getenv("QUANTEMPO_FUZZ_TARGET");
  return fixed != nullptr ? std::atoi(fixed) : data[0] % Kinds;
}

std::size_t mutate(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  Mutator mutator(seed);
  if (size < 2 || mutator.below(10) == 0) return LLVMFuzzerMutate(data, size, most);
  const int kind = kind_of(data);
  const bool safetensors = kind == Vectors || kind == Table;
  std::string document(reinterpret_cast<char*>(data) + 1, size - 1), rest;
  if (kind == Graph) {
    if (!mutate_graph(document, mutator.random())) return LLVMFuzzerMutate(data, size, most);
  } else {
    Json json;
    if (!parse(document, safetensors, json, rest)) return LLVMFuzzerMutate(data, size, most);
    for (std::size_t i = 0, count = 1 + mutator.below(4); i < count; ++i) mutator.change(json);
    document = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  if (safetensors) {
    const std::uint64_t length = document.size();
    std::string front(8, '\0');
    std::memcpy(front.data(), &length, 8);
    document = front + document + rest;
  }
  if (document.size() + 1 > most) return LLVMFuzzerMutate(data, size, most);
  std::memcpy(data + 1, document.data(), document.size());
  return document.size() + 1;
}
