#include "cpu.hpp"

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

#include "error.hpp"
#include "files.hpp"
#include "onnx_file.hpp"

namespace quantempo::runtime {

bool exact_integers() {
#if defined(__x86_64__) || defined(__i386__)
  // What is not known counts as absent; a feature counts only where every core has it.
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  std::size_t cores = 0, exact = 0;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line);
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    ++cores;
    exact += flags.count("avx512_vnni") + flags.count("avx_vnni") + flags.count("amx_int8") > 0 ? 1 : 0;
  }
  return cores > 0 && exact == cores;
#else
  return true;
#endif
}

std::string saturation_reason(const std::string& graph) {
  // Two products of at most 255 * w must fit into a signed 16-bit sum.
  constexpr int lowest = -64, highest = 64;
  constexpr std::size_t sampled = std::size_t{1} << 16;
  const std::string folder = graph.substr(0, graph.rfind('/') + 1);
  std::size_t count = 0;
  std::string first;
  for (const auto& tensor : external_tensors(graph)) {
    if (tensor.dtype != "int8" || tensor.shape.size() < 2) continue;
    const MappedFile file(folder + tensor.location);
    const std::size_t size = std::min(element_count(tensor.shape), sampled);
    if (tensor.offset > file.size() || size > file.size() - tensor.offset || size == 0) continue;
    const auto* values = reinterpret_cast<const signed char*>(file.data() + tensor.offset);
    const auto [low, high] = std::minmax_element(values, values + size);
    if (*low >= lowest && *high <= highest) continue;
    if (count++ == 0) first = tensor.name + " (" + std::to_string(*low) + " to " + std::to_string(*high) + ")";
  }
  if (count == 0) return "";
  return std::to_string(count) + " weights such as " + first +
         ": without VNNI, sums of two U8·S8 products saturate at 16 bits; weights of 7 bits cannot";
}

}  // namespace quantempo::runtime
