#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "rng.hpp"

namespace quantempo::runtime {

namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& wanted,
                         const std::string& remedy, const std::string& cause = "a value of another kind") {
  throw Error(Kind::RequestError, where, found, wanted, cause, remedy);
}

std::string negative(const std::string& name) { return "negative_" + name; }

const GivenArray* given(const Request& request, const std::string& name) {
  const GivenArray* found = nullptr;
  for (const auto& array : request.arrays) {
    if (array.name == name) found = &array;
  }
  return found;
}

std::vector<std::string> array_names(const Denoiser& denoiser) {
  std::vector<std::string> names;
  for (const auto& spec : denoiser.arrays) {
    names.push_back(spec.name);
    if (spec.guided) names.push_back(negative(spec.name));
  }
  return names;
}

void check_names(const Request& request, const Denoiser& denoiser) {
  const auto known = array_names(denoiser);
  for (const auto& array : request.arrays) {
    if (std::find(known.begin(), known.end(), array.name) != known.end()) continue;
    refuse("call", "an unknown argument " + repr(array.name),
           "inputs of this bundle (" + (known.empty() ? "it has none" : join(known)) + ")", nearest(array.name, known),
           "a misspelling, or an argument of another pipeline");
  }
  for (const auto& spec : denoiser.arrays) {
    if (given(request, spec.name) != nullptr) continue;
    std::string sizes;
    for (const auto& dimension : spec.shape) sizes += ", " + shown(dimension, false);
    refuse(spec.name, "no value", "an array " + spec.dtype + " (batch" + sizes + ")", "pass " + spec.name,
           "the model is conditioned on it");
  }
  if (request.labels && denoiser.classes.empty()) {
    refuse("class_labels", "labels", "none: this model is not conditioned on classes",
           "leave class_labels out (on the command line: --class)",
           "the bundle was made from another kind of model");
  }
  for (const auto& spec : denoiser.classes) {
    const bool first = &spec == &denoiser.classes.front();
    if (request.labels && first) continue;
    refuse("class_labels", "no value", "labels 0 to " + std::to_string(spec.count - 1),
           "pass one label, or one per sample", "the model is conditioned on classes");
  }
}

void check_labels(const Request& request, const Denoiser& denoiser) {
  if (!request.labels) return;
  const auto count = denoiser.classes.front().count;
  for (const auto label : *request.labels) {
    if (label >= 0 && label < count) continue;
    refuse("class_labels", std::to_string(label), "labels 0 to " + std::to_string(count - 1),
           "the nearest legal label is " + std::to_string(label < 0 ? 0 : count - 1),
           "the model knows " + std::to_string(count) + " classes");
  }
}

bool finite(const GivenArray& array) {
  if (array.dtype == "float32") {
    const auto* values = static_cast<const float*>(array.data);
    return std::all_of(values, values + array.bytes / sizeof *values, [](float v) { return std::isfinite(v); });
  }
  if (array.dtype == "float64") {
    const auto* values = static_cast<const double*>(array.data);
    return std::all_of(values, values + array.bytes / sizeof *values, [](double v) { return std::isfinite(v); });
  }
  return true;
}

void check_array(const ArrayInput& spec, const GivenArray& array) {
  if (array.dtype != spec.dtype) {
    refuse(array.name, "type " + array.dtype, "type " + spec.dtype, "pass an array of " + spec.dtype);
  }
  std::string sizes;
  for (const auto& dimension : spec.shape) sizes += ", " + shown(dimension, false);
  bool fits = array.shape.size() == spec.shape.size() + 1 && array.shape[0] >= 1;
  for (std::size_t i = 0; fits && i < spec.shape.size(); ++i) {
    const auto* size = std::get_if<std::int64_t>(&spec.shape[i]);
    fits = size != nullptr ? *size == array.shape[i + 1] : array.shape[i + 1] >= 1;
  }
  if (!fits) {
    refuse(array.name, "shape " + shown(array.shape), "shape (batch" + sizes + ")", "pass an array of that shape",
           "the array was made for another model");
  }
  const std::size_t bytes = element_count(array.shape) * element_size(array.dtype);
  if (array.data == nullptr || array.bytes != bytes) {
    refuse(array.name, std::to_string(array.bytes) + " bytes", std::to_string(bytes) + " bytes",
           "pass the whole array", "a short buffer");
  }
  if (!finite(array)) refuse(array.name, "NaN or infinity", "finite numbers", "look at what made the array");
}

template <typename T>
bool repeats(const GivenArray& array, const std::vector<double>& values) {
  const auto* items = static_cast<const T*>(array.data);
  for (std::size_t i = 0; i < array.bytes / sizeof(T); ++i) {
    if (static_cast<double>(items[i]) != values[i % values.size()]) return false;
  }
  return true;
}

// Whether each row of an array holds these values; of a type that a mask or a length does not have, nothing is known.
bool holds(const GivenArray& array, const PinnedInput& pinned) {
  const auto& wanted = pinned.shape;
  if (array.shape.size() < wanted.size() || !std::equal(wanted.rbegin(), wanted.rend(), array.shape.rbegin())) return false;
  const std::size_t bytes = element_count(array.shape) * element_size(array.dtype);
  if (bytes != 0 && (array.data == nullptr || array.bytes != bytes)) return false;
  if (bytes == 0 || pinned.values.empty()) return bytes == 0;
  if (array.dtype == "bool" || array.dtype == "uint8") return repeats<std::uint8_t>(array, pinned.values);
  if (array.dtype == "int8") return repeats<std::int8_t>(array, pinned.values);
  if (array.dtype == "int32") return repeats<std::int32_t>(array, pinned.values);
  if (array.dtype == "int64") return repeats<std::int64_t>(array, pinned.values);
  if (array.dtype == "float32") return repeats<float>(array, pinned.values);
  return array.dtype == "float64" && repeats<double>(array, pinned.values);
}

// The graphs do not take these inputs: they are checked and go no further.
Request without_pinned(Request request, const Denoiser& denoiser) {
  constexpr std::size_t shown_values = 12;
  for (const auto& pinned : denoiser.pinned) {
    const GivenArray* array = given(request, pinned.name);
    if (array == nullptr) continue;
    if (!holds(*array, pinned)) {
      std::vector<std::string> words;
      for (const double value : pinned.values) words.push_back(words.size() < shown_values ? general(value) : "...");
      words.resize(std::min(words.size(), shown_values + 1));
      refuse("call, " + pinned.name, "other contents", "[" + join(words, " ") + "] in every row",
             "leave " + pinned.name + " out, or compile the model again with example inputs that hold these contents",
             "the model's Python branches on them, and the graphs hold one branch");
    }
    auto& arrays = request.arrays;
    arrays.erase(std::remove_if(arrays.begin(), arrays.end(), [&](const auto& each) { return each.name == pinned.name; }),
                 arrays.end());
  }
  return request;
}

// The number of samples; everything that tells one must agree, and a single value spreads over the batch.
std::int64_t batch_of(const Request& request, const Manifest& manifest) {
  std::vector<std::pair<std::string, std::int64_t>> told;
  const auto tell = [&](const std::string& name, std::size_t count) {
    if (count != 1) told.emplace_back(name, static_cast<std::int64_t>(count));
  };
  if (request.batch) told.emplace_back("batch_size", *request.batch);
  if (request.labels) tell("class_labels", request.labels->size());
  for (const auto& array : request.arrays) tell(array.name, static_cast<std::size_t>(array.shape[0]));
  const std::size_t sample = element_count(manifest.denoiser.latents_shape);
  // Another number of elements is refused below, in words of its own.
  const bool whole = request.latents_count != 0 && request.latents_count % sample == 0;
  if (request.latents != nullptr && whole) tell("latents", request.latents_count / sample);
  if (request.seeds) tell("seed", request.seeds->size());
  if (request.guidance) tell("guidance_scale", request.guidance->size());
  std::int64_t batch = told.empty() ? 1 : told.front().second;
  for (const auto& entry : told) batch = std::max(batch, entry.second);
  for (const auto& [name, size] : told) {
    if (size == batch) continue;
    const auto other = std::find_if(told.begin(), told.end(), [&](const auto& e) { return e.second == batch; });
    refuse(name, std::to_string(size) + " samples", std::to_string(batch) + ", as in " + other->first,
           "pass 1 or " + std::to_string(batch) + " of them", "two arguments disagree about the batch");
  }
  constexpr std::int64_t largest = 1 << 20;
  const auto limit = manifest.denoiser.max_batch.value_or(largest);
  if (batch < 1 || batch > limit) {
    refuse("batch", std::to_string(batch) + " samples",
           manifest.denoiser.max_batch ? "1 to " + std::to_string(limit) : "at least 1",
           "the nearest legal batch is " + std::to_string(batch < 1 ? 1 : limit) + "; split the call",
           batch < 1 ? "an empty list of samples"
                     : "the bundle was compiled for at most " + std::to_string(limit) + " rows");
  }
  return batch;
}

std::vector<unsigned char> spread(const unsigned char* data, std::size_t bytes, std::int64_t rows, std::int64_t batch) {
  std::vector<unsigned char> out(data, data + bytes);
  if (rows == 1) {
    for (std::int64_t i = 1; i < batch; ++i) out.insert(out.end(), data, data + bytes);
  }
  return out;
}

Condition pair_of(const Request& request, const ArrayInput& spec, std::int64_t batch) {
  const GivenArray& positive = *given(request, spec.name);
  const GivenArray* other = spec.guided ? given(request, negative(spec.name)) : nullptr;
  Condition condition{spec.dtype, positive.shape, {}, {}};
  condition.shape[0] = batch;
  condition.conditional =
      spread(static_cast<const unsigned char*>(positive.data), positive.bytes, positive.shape[0], batch);
  if (other == nullptr) return condition;
  if (!std::equal(other->shape.begin() + 1, other->shape.end(), positive.shape.begin() + 1, positive.shape.end())) {
    refuse(other->name, "shape " + shown(other->shape), "shape " + shown(positive.shape),
           "pad it to the shape of " + spec.name, "both branches run in one graph with one set of shapes");
  }
  condition.unconditional = spread(static_cast<const unsigned char*>(other->data), other->bytes, other->shape[0], batch);
  return condition;
}

Condition labels_of(const ClassInput& spec, const std::vector<std::int64_t>& labels, std::int64_t batch) {
  const auto bytes_of = [](const std::vector<std::int64_t>& values) {
    const auto* raw = reinterpret_cast<const unsigned char*>(values.data());
    return std::vector<unsigned char>(raw, raw + values.size() * sizeof(std::int64_t));
  };
  std::vector<std::int64_t> row = labels;
  if (row.size() == 1) row.resize(static_cast<std::size_t>(batch), labels[0]);
  Condition condition{"int64", {batch}, bytes_of(row), {}};
  if (spec.null) condition.unconditional = bytes_of(std::vector<std::int64_t>(static_cast<std::size_t>(batch), *spec.null));
  return condition;
}

std::vector<double> guidance_of(const Request& request, std::int64_t batch, const Manifest& manifest) {
  const auto& denoiser = manifest.denoiser;
  bool possible = std::any_of(denoiser.classes.begin(), denoiser.classes.end(), [](const auto& c) { return c.null.has_value(); });
  std::string missing;
  for (const auto& spec : denoiser.arrays) {
    if (!spec.guided) continue;
    if (missing.empty()) missing = negative(spec.name);
    possible = possible || given(request, negative(spec.name)) != nullptr;
  }
  std::vector<double> scales = request.guidance.value_or(std::vector<double>{possible ? manifest.default_guidance : 1.0});
  if (scales.size() == 1) scales.resize(static_cast<std::size_t>(batch), scales[0]);
  double largest = 0.0;
  for (const double scale : scales) {
    if (!std::isfinite(scale) || scale < 0) {
      refuse("guidance_scale", general(scale), "finite numbers of at least 0", "1.0 means no guidance");
    }
    largest = std::max(largest, scale);
  }
  if (largest > 1.0 && !possible) {
    refuse("guidance_scale", general(largest), "1.0",
           missing.empty() ? "the nearest legal value is 1.0" : "pass " + missing,
           "the call has no unconditional branch to guide with");
  }
  return scales;
}

std::vector<float> latents_of(const Request& request, std::int64_t batch, const Denoiser& denoiser) {
  if (request.latents == nullptr) return {};
  const std::size_t sample = element_count(denoiser.latents_shape), count = static_cast<std::size_t>(batch) * sample;
  if (request.latents_count != count && request.latents_count != sample) {
    refuse("latents", std::to_string(request.latents_count) + " numbers", std::to_string(count) + " numbers",
           "pass a sample of shape " + shown(denoiser.latents_shape) + ", or one per sample",
           "latents of another model or resolution; a bundle is compiled for one resolution");
  }
  std::vector<float> latents(request.latents, request.latents + request.latents_count);
  const bool sound = std::all_of(latents.begin(), latents.end(), [](float v) { return std::isfinite(v); });
  if (!sound) refuse("latents", "NaN or infinity", "finite float32", "pass latents without NaN");
  while (latents.size() < count) latents.insert(latents.end(), request.latents, request.latents + sample);
  return latents;
}

std::uint64_t fresh_seed() {
  std::random_device device;
  return (std::uint64_t{device()} << 32 | device()) >> 1;
}

// One seed gives sample `i` the stream `i` of that seed; a list gives each sample its own seed and stream 0.
DrawNoise noise_of(const std::vector<std::pair<std::uint64_t, std::uint32_t>>& streams, std::size_t count) {
  return [streams, count](std::int64_t draw, float* out) {
    for (std::size_t row = 0; row < streams.size(); ++row) {
      standard_normal(streams[row].first, streams[row].second, static_cast<std::uint32_t>(draw), out + row * count, count);
    }
  };
}

}  // namespace

Resolved resolve(const Request& asked, const Manifest& manifest) {
  const auto& denoiser = manifest.denoiser;
  const Request request = without_pinned(asked, denoiser);
  check_names(request, denoiser);
  check_labels(request, denoiser);
  for (const auto& spec : denoiser.arrays) {
    for (const auto& name : {spec.name, negative(spec.name)}) {
      const GivenArray* array = given(request, name);
      if (array != nullptr) check_array(spec, *array);
    }
  }
  const std::int64_t batch = batch_of(request, manifest);
  Resolved resolved;
  LoopRequest& loop = resolved.loop;
  loop.batch = static_cast<std::size_t>(batch);
  loop.guidance = guidance_of(request, batch, manifest);
  for (const auto& spec : denoiser.classes) loop.conditioning.emplace(spec.name, labels_of(spec, *request.labels, batch));
  for (const auto& spec : denoiser.arrays) loop.conditioning.emplace(spec.name, pair_of(request, spec, batch));
  if (!(request.rescale >= 0.0 && request.rescale <= 1.0)) {
    refuse("guidance_rescale", general(request.rescale), "a number from 0 to 1",
           std::string("the nearest legal value is ") + (request.rescale > 1.0 ? "1.0" : "0.0"));
  }
  loop.rescale = request.rescale;
  loop.latents = latents_of(request, batch, denoiser);
  if (request.seed && request.seeds) {
    refuse("seed", "a seed and a list of seeds", "one of the two", "leave one of them out", "two sources of noise");
  }
  std::vector<std::pair<std::uint64_t, std::uint32_t>> streams;
  if (request.seeds) {
    for (std::size_t i = 0; i < loop.batch; ++i) {
      streams.emplace_back((*request.seeds)[request.seeds->size() == 1 ? 0 : i], 0u);
    }
  } else {
    const std::uint64_t seed = request.seed ? *request.seed : fresh_seed();
    for (std::size_t i = 0; i < loop.batch; ++i) streams.emplace_back(seed, static_cast<std::uint32_t>(i));
  }
  resolved.seed = streams.front().first;
  loop.noise = noise_of(streams, element_count(denoiser.latents_shape));
  const auto guided = std::count_if(loop.guidance.begin(), loop.guidance.end(), [](double g) { return g > 1.0; });
  if (request.mode.empty()) {
    loop.batched = !denoiser.max_batch || batch + guided <= *denoiser.max_batch;
  } else if (request.mode == "batched" || request.mode == "split") {
    loop.batched = request.mode == "batched";
  } else {
    refuse("guidance_mode", repr(request.mode), "'batched' or 'split'", nearest(request.mode, {"batched", "split"}),
           "a misspelling");
  }
  return resolved;
}

}  // namespace quantempo::runtime
