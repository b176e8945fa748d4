// Safetensors files: eight bytes with the length of the header (little-endian), the header in JSON, the data.
#pragma once

#include <map>
#include <string>

#include "tensors.hpp"
#include "variants.hpp"

namespace quantempo::runtime {

struct TensorEntry {
  std::string dtype;  // numpy's word
  Shape shape;
  std::size_t begin = 0, end = 0;  // in the file's bytes
};

// The table of contents, checked: lengths fit types and shapes, entries tile the data without gap or overlap.
// Throws `BundleError`; `shown_as` names the file.
std::map<std::string, TensorEntry> read_tensor_table(const std::string& bytes, const std::string& shown_as);

// The arrays of a vectors file: finite float32 of shape (rows, channels).  Throws `BundleError`.
Vectors read_vectors(const std::string& bytes, const std::string& shown_as);

// Refuses a table of activation scales that does not fit the number of groups.  Throws `BundleError`.
void check_scale_table(const std::string& bytes, const std::string& shown_as, std::size_t groups);

}  // namespace quantempo::runtime
