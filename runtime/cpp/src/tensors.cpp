#include "tensors.hpp"

#include "error.hpp"

namespace quantempo::runtime {

std::size_t element_size(const std::string& dtype) {
  static const std::map<std::string, std::size_t> sizes = {
      {"float32", 4}, {"float64", 8}, {"float16", 2}, {"bfloat16", 2}, {"int64", 8}, {"int32", 4}, {"int16", 2},
      {"int8", 1},    {"uint64", 8},  {"uint32", 4},  {"uint16", 2},   {"uint8", 1}, {"bool", 1}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

std::size_t element_count(const Shape& shape) {
  // A tensor of this many elements is no tensor but a damaged number.
  constexpr std::int64_t limit = std::int64_t{1} << 40;
  std::int64_t count = 1;
  for (const auto size : shape) {
    if (size < 0 || (size != 0 && count > limit / size)) {
      throw Error(Kind::DataError, "tensor", "shape " + shown(shape), "a size that fits into memory",
                  "the file was edited by hand or is damaged", "compile the bundle again");
    }
    count *= size;
  }
  return static_cast<std::size_t>(count);
}

std::string shown(const Dimension& dimension, bool quoted) {
  if (const auto* size = std::get_if<std::int64_t>(&dimension)) return std::to_string(*size);
  const auto& name = std::get<std::string>(dimension);
  return quoted ? repr(name) : name;
}

std::string shown(const std::vector<Dimension>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + shown(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string shown(const Shape& shape) { return shown(std::vector<Dimension>(shape.begin(), shape.end())); }

}  // namespace quantempo::runtime
