// What crosses a graph's border: names, element types and shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace quantempo::runtime {

// A fixed size, or the name of a symbolic one; the same name means the same size throughout a graph.
using Dimension = std::variant<std::int64_t, std::string>;
using Shape = std::vector<std::int64_t>;

struct TensorSpec {
  std::string name, dtype;  // numpy's word for the element type
  std::vector<Dimension> shape;

  bool operator==(const TensorSpec& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
  bool operator!=(const TensorSpec& other) const { return !(*this == other); }
};

// Bytes of one element; 0 for a type that no runtime handles.
std::size_t element_size(const std::string& dtype);

// The number of elements.  Throws `DataError` where it does not fit what a process can hold.
std::size_t element_count(const Shape& shape);

// A shape as Python shows a tuple.
std::string shown(const Shape& shape);
std::string shown(const std::vector<Dimension>& shape);

// A dimension of ours in the words of the manifest, symbols quoted.
std::string shown(const Dimension& dimension, bool quoted = true);

}  // namespace quantempo::runtime
