// What the TensorRT backend reads before it needs TensorRT: the record of a bundle's engines and the plan of a graph.
//
//     record GRAPH TARGET CAPABILITY LIBRARY [DIMENSION=SIZE...]
//
// Prints the plan's file and its bytes' digest, and with sizes the number of the profile that takes them; or an error in
// the words of quantempo_last_error.  TARGET may be empty.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "backends/tensorrt_record.hpp"
#include "error.hpp"
#include "sha256.hpp"

namespace rt = quantempo::runtime;

int main(int count, char** words) {
  if (count < 5) return 2;
  try {
    const rt::PlanFile plan = rt::load_plan(words[1], words[2], words[3], words[4]);
    std::printf("%s\n%s\n", plan.where.c_str(), rt::digest_of(plan.bytes).c_str());
    rt::Sizes sizes;
    for (int i = 5; i < count; ++i) {
      const std::string word = words[i];
      const auto equals = word.find('=');
      sizes[word.substr(0, equals)] = std::strtoll(word.c_str() + equals + 1, nullptr, 10);
    }
    if (!sizes.empty()) std::printf("%d\n", rt::choose_profile("plan", plan.profiles, sizes));
    return 0;
  } catch (const rt::Error& error) {
    std::fprintf(stderr, "%s: %s\n", rt::kind_name(error.kind), error.what());
    return 1;
  }
}
