#include "session.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace quantempo::runtime {

namespace {

using Clock = std::chrono::steady_clock;

// Latents per call of the decoder, which needs far more memory per sample than the denoiser.
constexpr std::size_t kDecodeRows = 8;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void check_mode(const std::string& mode) {
  if (mode == "auto" || mode == "none" || mode == "plan") return;
  throw Error(Kind::RequestError, "feature_cache", repr(mode), "'auto', 'none' or 'plan'", "a misspelling",
              nearest(mode, {"auto", "none", "plan"}));
}

std::vector<std::string> sorted_names(const std::vector<TensorSpec>& specs) {
  std::vector<std::string> names;
  for (const auto& spec : specs) names.push_back(spec.name);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

Session::Session(Bundle bundle, SessionOptions options) : bundle_(std::move(bundle)), options_(std::move(options)) {
  check_mode(options_.feature_cache);
  // The variants run in turns, so the activations of all can lie in the same memory.
  if (options_.backend == "ort" && bundle_.manifest().cache) options_.engine.settings.emplace("arena", "shared");
  backend_ = open_backend(options_.backend, options_.engine);
  const Manifest& manifest = bundle_.manifest();
  std::vector<std::string> there;
  for (const auto& dialect : {"ort", "portable", "fp8", "float"}) {
    if (!denoisers(manifest, dialect).empty()) there.emplace_back(dialect);
  }
  std::string chosen = options_.dialect;
  for (const auto& dialect : backend_->dialects()) {
    if (chosen.empty() && std::find(there.begin(), there.end(), dialect) != there.end()) chosen = dialect;
  }
  entries_ = denoisers(manifest, chosen);
  if (entries_.empty()) {
    throw Error(Kind::BundleError, bundle_.root(),
                "denoiser graphs of the dialects: " + (there.empty() ? "none" : join(there)),
                chosen.empty() ? "a denoiser graph for " + options_.backend : "dialect " + repr(chosen),
                "the bundle was compiled for another target", there.empty() ? "compile it again" : nearest(chosen, there));
  }
  for (const auto& [name, entry] : entries_) variants_.emplace(name, Variant::of(*entry));
  for (const auto& [steps, program] : bundle_.cached()) {
    const auto names = program.variants();
    const bool all = std::all_of(names.begin(), names.end(), [&](const auto& n) { return variants_.count(n) != 0; });
    if (all) cached_.emplace(steps, &program);
  }
  for (const auto& [name, variant] : variants_) {
    const auto& outputs = variant.outputs;
    const bool predicts = std::find(outputs.begin(), outputs.end(), manifest.denoiser.prediction) != outputs.end();
    if (variant.reads.empty() && predicts) engine(name);  // now, so that what an engine refuses is refused here
  }
  const Partition* partition = manifest.partition ? &*manifest.partition : nullptr;
  loop_ = std::make_unique<Loop>(model(), partition, options_.engine.notice);
}

Model Session::model() {
  Model model;
  model.engine = [this](const std::string& variant) -> Engine& { return engine(variant); };
  model.denoiser = &bundle_.manifest().denoiser;
  model.variants = variants_;
  model.vectors = &bundle_.vectors();
  return model;
}

Engine& Session::engine(const std::string& variant) {
  auto& found = engines_[variant];
  if (!found) found = open(*entries_.at(variant));
  return *found;
}

std::unique_ptr<Engine> Session::open(const GraphEntry& entry) {
  auto engine = backend_->open(bundle_.path(entry.file), entry.dialect);
  const auto listed_in = sorted_names(entry.inputs), listed_out = sorted_names(entry.outputs);
  const auto in = sorted_names(engine->inputs), out = sorted_names(engine->outputs);
  if (in == listed_in && out == listed_out) return engine;
  throw Error(Kind::EngineError, entry.file, "inputs " + join(in) + " and outputs " + join(out),
              "inputs " + join(listed_in) + " and outputs " + join(listed_out),
              "manifest and graph do not belong together", "compile the bundle again");
}

const StepProgram* Session::choose(const SampleOptions& options, StepProgram& held) {
  const std::string mode = options.feature_cache.empty() ? options_.feature_cache : options.feature_cache;
  check_mode(mode);
  if (options.program.empty()) {
    const std::int64_t count = options.steps == 0 ? bundle_.manifest().programs.default_steps : options.steps;
    const auto found = cached_.find(count);
    const StepProgram* cached = mode != "none" && found != cached_.end() ? found->second : nullptr;
    if (cached != nullptr && fitted_at(*cached, options.request)) return cached;
    held = bundle_.program(count);
    loop_->check(held);
    run_uncached(mode, held, cached);
    return &held;
  }
  held = read_program(options.program, "program");
  if (options.steps != 0 && options.steps != held.steps) {
    throw Error(Kind::RequestError, "num_inference_steps",
                std::to_string(options.steps) + " beside a program of " + std::to_string(held.steps) + " steps",
                "one of the two", "the program fixes the steps", "leave the number of steps out");
  }
  loop_->check(held);
  if (!is_cached(held, variants_)) {
    run_uncached(mode, held);
  } else if (mode == "none") {
    throw Error(Kind::RequestError, "feature_cache", "'none' beside a program that reuses features", "one of the two",
                "the program says which calls reuse", "pass another program, or leave feature_cache out");
  }
  return &held;
}

// Whether a plan is for the guidance that was asked for; scales of 1 or less all mean no guidance.
bool Session::fitted_at(const StepProgram& cached, const Request& request) const {
  if (!cached.fitted_guidance) return true;
  const double fitted = *cached.fitted_guidance;
  const auto scales = request.guidance.value_or(std::vector<double>{bundle_.manifest().default_guidance});
  return std::all_of(scales.begin(), scales.end(),
                     [fitted](double scale) { return scale == fitted || (scale <= 1.0 && fitted <= 1.0); });
}

// Says, or refuses, that features are not reused; `cached` is a plan for these steps at another guidance scale.
void Session::run_uncached(const std::string& mode, const StepProgram& program, const StepProgram* cached) const {
  std::vector<std::string> there;
  for (const auto& entry : cached_) there.push_back(std::to_string(entry.first));
  std::string wanted = there.empty() ? "none for these graphs"
                                     : bundle_.manifest().programs.scheduler + " with " + join(there) + " steps";
  std::string run = std::to_string(program.steps) + " steps of " + program.scheduler;
  if (cached != nullptr) {
    run += " at this guidance scale";
    wanted += " at guidance " + general(*cached->fitted_guidance);
  }
  if (mode == "plan") {
    throw Error(Kind::RequestError, "feature_cache", "'plan' for " + run,
                "a call that the bundle has a plan for (" + wanted + ")",
                "a plan is fitted for one step count, scheduler and guidance scale",
                "take such a call, compile with feature caching for this one, or pass feature_cache 'none'");
  }
  if (mode == "auto" && bundle_.manifest().cache && options_.engine.notice) {
    options_.engine.notice("CacheUnused", "the bundle has no cache plan for " + run +
                                              ", which run without feature caching; it has plans for: " + wanted +
                                              " (feature_cache 'none' runs without this notice)");
  }
}

Output Session::sample(const SampleOptions& options) {
  const std::lock_guard<std::mutex> lock(busy_);
  cancelled_.store(false, std::memory_order_relaxed);
  const auto started = Clock::now();
  StepProgram held;
  const StepProgram* program = choose(options, held);
  Resolved resolved = resolve(options.request, bundle_.manifest());
  resolved.loop.cancelled = &cancelled_;
  const std::size_t sample = element_count(bundle_.manifest().denoiser.latents_shape);
  if (options.on_step || options.on_preview) {
    resolved.loop.on_step = [&](std::int64_t step, double timestep, std::vector<float>& latents) {
      if (options.on_step) options.on_step(step, program->steps, timestep, latents);
      if (!options.on_preview || (step + 1) % std::max<std::int64_t>(1, options.preview_every) != 0) return;
      const auto pictures = decode(std::vector<float>(latents.begin(), latents.begin() + static_cast<std::ptrdiff_t>(sample)));
      options.on_preview(step, pictures.at(0));
    };
  }
  Output output;
  output.samples = resolved.loop.batch;
  output.seed = resolved.seed;
  output.loop = loop_->run(*program, resolved.loop);
  const auto looped = Clock::now();
  if (options.decode) output.pictures = decode(output.loop.latents);
  output.decode_seconds = since(looped);
  output.total_seconds = since(started);
  return output;
}

std::vector<Picture> Session::decode(const std::vector<float>& latents) {
  const Manifest& manifest = bundle_.manifest();
  const Shape& shape = manifest.denoiser.latents_shape;
  const std::size_t sample = element_count(shape), batch = latents.size() / sample;
  const auto scaling = static_cast<float>(manifest.decoder.scaling), shift = static_cast<float>(manifest.decoder.shift);
  std::vector<float> scaled(latents.size());
  for (std::size_t i = 0; i < latents.size(); ++i) {
    const float divided = latents[i] / scaling;
    scaled[i] = divided + shift;
  }
  const auto picture = [&](const float* data, const Shape& of) {
    const auto size = [&](std::size_t i) { return static_cast<std::size_t>(of[i]); };
    return to_picture(data, size(0), size(1), size(2));
  };
  std::vector<Picture> pictures;
  if (!manifest.decoder.graph) {
    if (shape.size() != 3) {
      throw Error(Kind::RequestError, "decode", "latents of shape " + shown(shape), "channels, height and width",
                  "the bundle has no decoder and its latents are no pictures", "ask for the latents alone");
    }
    for (std::size_t i = 0; i < batch; ++i) pictures.push_back(picture(scaled.data() + i * sample, shape));
    return pictures;
  }
  if (!decoder_) decoder_ = open(manifest.graphs.at(*manifest.decoder.graph));
  const auto misfit = [&](const std::string& found) {
    return Error(Kind::EngineError, decoder_->name, found,
                 "one float32 input of latents and one float32 output (batch, channels, height, width)",
                 "the graph does not fit the manifest", "compile the bundle again");
  };
  if (decoder_->inputs.size() != 1 || decoder_->outputs.empty()) throw misfit("other inputs or outputs");
  const TensorSpec& given = decoder_->inputs[0];
  for (std::size_t start = 0; start < batch; start += kDecodeRows) {
    const std::size_t rows = std::min(kDecodeRows, batch - start);
    auto& binding = decoder_bindings_[rows];
    if (!binding) {
      Sizes sizes;
      Shape whole = {static_cast<std::int64_t>(rows)};
      whole.insert(whole.end(), shape.begin(), shape.end());
      for (std::size_t i = 0; i < given.shape.size() && i < whole.size(); ++i) {
        if (const auto* symbol = std::get_if<std::string>(&given.shape[i])) sizes[*symbol] = whole[i];
      }
      auto made_binding = decoder_->bind(sizes, {});
      const Buffer& in = *made_binding->inputs.at(given.name);
      const Buffer& out = *made_binding->outputs.at(decoder_->outputs[0].name);
      if (in.shape != whole || in.spec.dtype != "float32") throw misfit(in.spec.dtype + " " + shown(in.shape));
      const bool picture_like = out.shape.size() == 4 && out.shape[0] == whole[0] && out.spec.dtype == "float32";
      if (!picture_like) throw misfit(out.spec.dtype + " " + shown(out.shape));
      // One full chunk and one remainder are worth their memory, no more.
      for (auto at = decoder_bindings_.begin(); at != decoder_bindings_.end();) {
        at = at->first != kDecodeRows && at->first != rows ? decoder_bindings_.erase(at) : std::next(at);
      }
      binding = std::move(made_binding);
    }
    Buffer& in = *binding->inputs.at(given.name);
    Buffer& out = *binding->outputs.at(decoder_->outputs[0].name);
    std::memcpy(in.data, scaled.data() + start * sample, rows * sample * sizeof(float));
    in.push();
    binding->run();
    out.pull();
    const Shape image(out.shape.begin() + 1, out.shape.end());
    for (std::size_t i = 0; i < rows; ++i) pictures.push_back(picture(out.as<float>() + i * element_count(image), image));
  }
  return pictures;
}

}  // namespace quantempo::runtime
