// The arguments of a call, checked against the bundle and brought into the loop's form.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "loop.hpp"
#include "manifest.hpp"

namespace quantempo::runtime {

struct GivenArray {
  std::string name, dtype;
  Shape shape;
  const void* data = nullptr;
  std::size_t bytes = 0;
};

// Arguments as the caller gave them; absent ones are empty.
struct Request {
  std::optional<std::int64_t> batch;
  std::optional<std::vector<std::int64_t>> labels;
  std::optional<std::uint64_t> seed;
  std::optional<std::vector<std::uint64_t>> seeds;
  std::optional<std::vector<double>> guidance;
  double rescale = 0.0;
  std::string mode;  // batched, split, or empty
  const float* latents = nullptr;
  std::size_t latents_count = 0;
  std::vector<GivenArray> arrays;
};

struct Resolved {
  LoopRequest loop;
  std::uint64_t seed = 0;  // the first
};

// Throws `RequestError`; every refusal names the nearest legal value.
Resolved resolve(const Request& request, const Manifest& manifest);

}  // namespace quantempo::runtime
