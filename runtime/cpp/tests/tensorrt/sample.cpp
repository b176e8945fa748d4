// The TensorRT backend in a whole session, on the device of device.cpp.
//
//     tensorrt BUNDLE STEPS CACHE FILE [KEY=VALUE]
//
// Samples labels 3 and 9 with seed 0, writes the final latents to FILE as float32 and prints the reused evaluations; or an
// error in the words of quantempo_last_error.  Each of two calls comes from a thread of its own, neither of which opened.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

#include "error.hpp"
#include "session.hpp"

namespace rt = quantempo::runtime;

namespace {

int sample(rt::Session& session, char** words) {
  try {
    rt::SampleOptions options;
    options.request.labels = std::vector<std::int64_t>{3, 9};
    options.request.seed = 0;
    options.steps = std::atoll(words[2]);
    options.feature_cache = words[3];
    options.decode = false;
    const rt::Output output = session.sample(options);
    std::ofstream file(words[4], std::ios::binary);
    const auto& latents = output.loop.latents;
    file.write(reinterpret_cast<const char*>(latents.data()), static_cast<std::streamsize>(latents.size() * sizeof(float)));
    std::printf("%lld\n", static_cast<long long>(output.loop.reused));
    return 0;
  } catch (const rt::Error& error) {
    std::fprintf(stderr, "%s: %s\n", rt::kind_name(error.kind), error.what());
    return 1;
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 5 && count != 6) return 2;
  try {
    rt::SessionOptions options;
    options.backend = "tensorrt";
    if (count == 6) {
      const std::string word = words[5];
      options.engine.settings[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    }
    rt::Session session(rt::Bundle::open(words[1]), options);
    int code = 0;
    for (int i = 0; i < 2 && code == 0; ++i) std::thread([&] { code = sample(session, words); }).join();
    return code;
  } catch (const rt::Error& error) {
    std::fprintf(stderr, "%s: %s\n", rt::kind_name(error.kind), error.what());
    return 1;
  }
}
