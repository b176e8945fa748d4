#include "safetensors.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "data.hpp"

namespace quantempo::runtime {

namespace {

constexpr std::size_t kLongestHeader = 100u << 20;  // as the safetensors package has it

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& wanted) {
  throw Error(Kind::BundleError, where, found, wanted, "the bundle was changed by hand, or put together from two",
              "compile the bundle again");
}

[[noreturn]] void damaged(const std::string& shown_as, const std::string& why) {
  refuse(shown_as, "a file that safetensors refuses (" + why + ")", "a safetensors file");
}

std::string numpy_name(const std::string& word) {
  static const std::map<std::string, std::string> names = {
      {"F64", "float64"}, {"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}, {"I64", "int64"},
      {"I32", "int32"},   {"I16", "int16"},   {"I8", "int8"},     {"U64", "uint64"},    {"U32", "uint32"},
      {"U16", "uint16"},  {"U8", "uint8"},    {"BOOL", "bool"}};
  const auto found = names.find(word);
  return found == names.end() ? "" : found->second;
}

TensorEntry read_entry(const Node& node, std::size_t start, std::size_t size) {
  node.keys("tensor", {"dtype", "shape", "data_offsets"});
  TensorEntry entry;
  const std::string word = node.at("tensor", "dtype").text();
  entry.dtype = numpy_name(word);
  if (entry.dtype.empty()) throw std::runtime_error("unknown type " + repr(word));
  for (const auto& item : node.at("tensor", "shape").list()) entry.shape.push_back(item.integer());
  const auto offsets = node.at("tensor", "data_offsets").list();
  if (offsets.size() != 2) throw std::runtime_error("data_offsets of other than two numbers");
  const auto begin = offsets[0].integer(), end = offsets[1].integer();
  if (begin < 0 || end < begin || static_cast<std::uint64_t>(end) > size - start) {
    throw std::runtime_error("offsets outside the file");
  }
  if (static_cast<std::size_t>(end - begin) != element_count(entry.shape) * element_size(entry.dtype)) {
    throw std::runtime_error("a length that does not fit type and shape");
  }
  entry.begin = start + static_cast<std::size_t>(begin);
  entry.end = start + static_cast<std::size_t>(end);
  return entry;
}

std::map<std::string, TensorEntry> parse_table(const std::string& bytes, const std::string& shown_as) {
  if (bytes.size() < 8) throw std::runtime_error("the header is cut short");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes[static_cast<std::size_t>(i)]);
  if (length > kLongestHeader) throw std::runtime_error("a header of " + std::to_string(length) + " bytes");
  if (length > bytes.size() - 8) throw std::runtime_error("the header is cut short");
  const Json header = parse_json(bytes.substr(8, static_cast<std::size_t>(length)), shown_as);
  std::map<std::string, TensorEntry> table;
  for (const auto& [name, node] : Node(header, shown_as).entries()) {
    if (name == "__metadata__") {
      node.text_map();
    } else {
      table.emplace(name, read_entry(node, 8 + static_cast<std::size_t>(length), bytes.size()));
    }
  }
  std::vector<std::pair<std::size_t, std::size_t>> spans;
  for (const auto& item : table) spans.emplace_back(item.second.begin, item.second.end);
  std::sort(spans.begin(), spans.end());
  std::size_t at = 8 + static_cast<std::size_t>(length);
  for (const auto& [begin, end] : spans) {
    if (begin != at) throw std::runtime_error("tensors that overlap or leave a gap");
    at = end;
  }
  if (at != bytes.size()) throw std::runtime_error("bytes that belong to no tensor, or too few");
  return table;
}

float float_at(const std::string& bytes, std::size_t at) {
  float value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

}  // namespace

std::map<std::string, TensorEntry> read_tensor_table(const std::string& bytes, const std::string& shown_as) {
  try {
    return parse_table(bytes, shown_as);
  } catch (const Error& error) {
    damaged(shown_as, error.where + ": " + error.found);
  } catch (const std::runtime_error& error) {
    damaged(shown_as, error.what());
  }
}

Vectors read_vectors(const std::string& bytes, const std::string& shown_as) {
  Vectors vectors;
  for (const auto& [name, entry] : read_tensor_table(bytes, shown_as)) {
    const std::string where = shown_as + ": " + repr(name);
    if (entry.dtype != "float32" || entry.shape.size() != 2 || entry.begin == entry.end) {
      refuse(where, entry.dtype + " " + shown(entry.shape), "float32 of shape (rows, channels)");
    }
    VectorArray array;
    array.rows = static_cast<std::size_t>(entry.shape[0]);
    array.channels = static_cast<std::size_t>(entry.shape[1]);
    array.values.resize(array.rows * array.channels);
    std::memcpy(array.values.data(), bytes.data() + entry.begin, entry.end - entry.begin);
    const bool finite = std::all_of(array.values.begin(), array.values.end(), [](float v) { return std::isfinite(v); });
    if (!finite) refuse(where, "NaN or infinity", "finite numbers");
    vectors.emplace(name, std::move(array));
  }
  return vectors;
}

void check_scale_table(const std::string& bytes, const std::string& shown_as, std::size_t groups) {
  for (const auto& [name, entry] : read_tensor_table(bytes, shown_as)) {
    const auto bar = name.rfind('|');
    const std::string part = bar == std::string::npos ? "" : name.substr(bar + 1);
    const std::string where = shown_as + ": " + repr(name);
    if (part != "scale" && part != "symmetric_scale" && part != "zero_point" && part != "centre") {
      refuse(where, "an array of that name", "TENSOR|scale, |zero_point, |symmetric_scale or |centre");
    }
    const char* dtype = part == "zero_point" ? "int32" : "float32";
    const std::size_t rank = part == "centre" ? 2 : 1;
    if (entry.dtype != dtype || entry.shape.size() != rank || entry.shape[0] != static_cast<std::int64_t>(groups)) {
      refuse(where, entry.dtype + " " + shown(entry.shape),
             std::string(dtype) + " of " + std::to_string(groups) + " groups");
    }
    if (part == "zero_point") continue;
    for (std::size_t at = entry.begin; at < entry.end; at += sizeof(float)) {
      const float value = float_at(bytes, at);
      if (std::isfinite(value) && (part == "centre" || value > 0)) continue;
      refuse(where, "a value of " + general(value), part == "centre" ? "finite numbers" : "finite scales above zero");
    }
  }
}

}  // namespace quantempo::runtime
