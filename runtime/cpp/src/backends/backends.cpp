#include "backends.hpp"

#include "../error.hpp"

namespace quantempo::runtime {

namespace {

using Opener = std::unique_ptr<Backend> (*)(const EngineOptions& options);

const std::map<std::string, Opener>& openers() {
  static const std::map<std::string, Opener> known = {
#ifdef QUANTEMPO_WITH_ORT
      {"ort", open_ort},
#endif
#ifdef QUANTEMPO_WITH_OPENVINO
      {"openvino", open_openvino},
#endif
#ifdef QUANTEMPO_WITH_TENSORRT
      {"tensorrt", open_tensorrt},
#endif
  };
  return known;
}

}  // namespace

bool simulates_fp8(const std::string& where, const std::string& dialect, const EngineOptions& options) {
  if (dialect != "fp8") return false;
  options.tell("SimulatedNotice", where + ": FP8 is simulated on this CPU (products in float32): do not time it");
  return true;
}

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const auto& entry : openers()) names.push_back(entry.first);
  return names;
}

std::unique_ptr<Backend> open_backend(const std::string& name, const EngineOptions& options) {
  const auto found = openers().find(name);
  if (found != openers().end()) return found->second(options);
  throw Error(Kind::EngineError, "engine", repr(name), "one of " + join(backend_names()),
              "a misspelling, or a backend that this library was built without", nearest(name, backend_names()));
}

}  // namespace quantempo::runtime
