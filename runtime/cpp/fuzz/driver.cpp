// Stands in for libFuzzer where the compiler has none: mutates the corpus, always in the same order, and counts.
//
//     fuzz-bundle CORPUS... [-runs=N] [-seed=N]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed);

namespace {
std::mt19937 random_source;

std::size_t below(std::size_t limit) { return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_source); }
}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most) {
  switch (below(3)) {
    case 0:
      if (size > 0) data[below(size)] = static_cast<std::uint8_t>(below(256));
      return size;
    case 1:
      return size > 1 ? size - 1 - below(std::min<std::size_t>(size - 1, 8)) : size;
    default:
      if (size < most) data[size++] = static_cast<std::uint8_t>(below(256));
      return size;
  }
}

int main(int count, char** words) {
  constexpr std::size_t most = 1 << 16;
  std::size_t runs = 20000;
  unsigned seed = 1;
  std::vector<std::vector<std::uint8_t>> corpus;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.rfind("-runs=", 0) == 0) runs = std::strtoull(word.c_str() + 6, nullptr, 10);
    else if (word.rfind("-seed=", 0) == 0) seed = static_cast<unsigned>(std::strtoul(word.c_str() + 6, nullptr, 10));
    else {
      std::vector<std::filesystem::path> paths;
      for (const auto& entry : std::filesystem::directory_iterator(word)) paths.push_back(entry.path());
      std::sort(paths.begin(), paths.end());
      for (const auto& path : paths) {
        std::ifstream file(path, std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      }
    }
  }
  if (corpus.empty()) return std::fprintf(stderr, "no corpus\n"), 2;
  random_source.seed(seed);
  for (const auto& input : corpus) LLVMFuzzerTestOneInput(input.data(), input.size());
  std::vector<std::uint8_t> buffer(most);
  for (std::size_t run = 0; run < runs; ++run) {
    const auto& input = corpus[below(corpus.size())];
    std::size_t size = std::min(input.size(), most);
    std::copy_n(input.begin(), size, buffer.begin());
    for (std::size_t i = 0, times = 1 + below(6); i < times; ++i) {
      size = LLVMFuzzerCustomMutator(buffer.data(), size, most, static_cast<unsigned>(random_source()));
    }
    // A copy of its own length, so that a read behind its end is seen.
    const std::vector<std::uint8_t> exact(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(size));
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
  }
  std::printf("%zu inputs of the corpus and %zu mutations: nothing found\n", corpus.size(), runs);
  return 0;
}
