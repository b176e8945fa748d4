// What each further graph of a model adds to the memory of a process: opens graphs one after another in one backend, as a
// session does, and runs each once on zeros with the features of those before it.
//
//     variants LIBRARY ROWS ARENA GRAPH...
//
// Prints, after each graph, its name and the anonymous and resident KiB of the process.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine.hpp"
#include "error.hpp"
#include "footprint.h"

namespace rt = quantempo::runtime;

namespace {

// Every free size is the number of rows.
rt::Sizes sizes_of(const rt::Engine& engine, std::int64_t rows) {
  rt::Sizes sizes;
  for (const auto& spec : engine.inputs) {
    for (const auto& dimension : spec.shape) {
      if (const auto* symbol = std::get_if<std::string>(&dimension)) sizes[*symbol] = rows;
    }
  }
  return sizes;
}

void print(const std::string& what) {
  std::printf("%s anonymous %ld resident %ld\n", what.c_str(), resident("RssAnon"), resident("VmRSS"));
}

}  // namespace

int main(int count, char** words) {
  if (count < 5) return 2;
  try {
    rt::EngineOptions options;
    options.library = words[1];
    options.threads = 1;
    options.settings["arena"] = words[3];
    const auto backend = rt::open_backend("ort", options);
    std::vector<std::unique_ptr<rt::Engine>> engines;
    std::vector<std::unique_ptr<rt::Binding>> bindings;
    rt::Buffers shared;
    print("nothing");
    for (int i = 4; i < count; ++i) {
      engines.push_back(backend->open(words[i], "ort"));
      rt::Buffers share;
      for (const auto& spec : engines.back()->inputs) {
        if (const auto found = shared.find(spec.name); found != shared.end()) share.insert(*found);
      }
      bindings.push_back(engines.back()->bind(sizes_of(*engines.back(), std::atoll(words[2])), share));
      shared.insert(bindings.back()->inputs.begin(), bindings.back()->inputs.end());
      shared.insert(bindings.back()->outputs.begin(), bindings.back()->outputs.end());
      bindings.back()->run();
      print(words[i]);
    }
    return 0;
  } catch (const rt::Error& error) {
    std::fprintf(stderr, "%s: %s\n", rt::kind_name(error.kind), error.what());
    return 1;
  }
}
