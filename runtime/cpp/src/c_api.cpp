// The C interface: nothing but translation.  Every function that can fail runs inside `guarded`.
#define QUANTEMPO_API __attribute__((visibility("default")))
#include "quantempo/quantempo.h"

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "error.hpp"
#include "files.hpp"
#include "session.hpp"

namespace rt = quantempo::runtime;

struct quantempo_session {
  explicit quantempo_session(rt::Bundle bundle, rt::SessionOptions options) : inner(std::move(bundle), std::move(options)) {}
  rt::Session inner;
};

struct quantempo_result {
  rt::Output output;
};

namespace {

thread_local std::string last_error;

quantempo_status told(quantempo_status status, const char* words) noexcept {
  try {
    last_error = words;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Runs a body; what it throws becomes a status and words.
template <typename Body>
quantempo_status guarded(const Body& body) noexcept {
  last_error.clear();
  try {
    body();
    return QUANTEMPO_OK;
  } catch (const rt::Error& error) {
    return told(static_cast<quantempo_status>(error.kind), error.what());
  } catch (const std::bad_alloc&) {
    return told(QUANTEMPO_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return told(QUANTEMPO_INTERNAL, error.what());
  } catch (...) {
    return told(QUANTEMPO_INTERNAL, "an unknown exception");
  }
}

[[noreturn]] void invalid(const std::string& where, const std::string& found, const std::string& wanted) {
  throw rt::Error(rt::Kind::InvalidArgument, where, found, wanted, "a fault of the calling program", "look at quantempo.h");
}

void need(const void* pointer, const char* where) {
  if (pointer == nullptr) invalid(where, "NULL", "a pointer");
}

// The caller's struct, as long as the caller knows it, over our defaults.
template <typename Struct>
Struct grown(const Struct* given, void (*defaults)(Struct*), const char* where) {
  Struct full;
  defaults(&full);
  if (given == nullptr) return full;
  const std::size_t size = given->size;
  // The first field after the size is the least that any version had.
  if (size <= sizeof(std::size_t) || size > 1u << 16) {
    invalid(std::string(where) + ".size", std::to_string(size), std::to_string(sizeof(Struct)));
  }
  std::memcpy(&full, given, size < sizeof(Struct) ? size : sizeof(Struct));
  full.size = sizeof(Struct);
  return full;
}

// Writes a struct of ours to the caller's, which may be shorter.
template <typename Struct>
void hand_out(const Struct& made, Struct* out, const char* where) {
  need(out, where);
  const std::size_t size = out->size;
  if (size <= sizeof(std::size_t) || size > 1u << 16) {
    invalid(std::string(where) + ".size", std::to_string(size), std::to_string(sizeof(Struct)));
  }
  std::memcpy(out, &made, size < sizeof(Struct) ? size : sizeof(Struct));
  out->size = size;
}

template <typename T>
std::vector<T> values(const T* data, std::size_t count, const char* where) {
  if (count > std::size_t{1} << 24) invalid(where, std::to_string(count) + " values", "fewer");
  if (data == nullptr) invalid(where, "NULL with a count of " + std::to_string(count), "a pointer");
  return std::vector<T>(data, data + count);
}

std::string word(const char* text) { return text == nullptr ? "" : text; }

void check_answer(std::int32_t answer, const char* callback, std::int64_t step) {
  if (answer == 0) return;
  const std::string where = std::string(callback) + " after step " + std::to_string(step);
  if (answer == 1) {
    throw rt::Error(rt::Kind::Cancelled, where, "1", "0 to go on", "the callback cancelled the run", "sample again");
  }
  throw rt::Error(rt::Kind::CallbackFailed, where, std::to_string(answer), "0 to go on, or 1 to cancel",
                  "the callback failed", "look at what it does");
}

quantempo_image shown(const rt::Picture& picture) {
  return {picture.pixels.data(), picture.width, picture.height, picture.channels};
}

rt::Request request_of(const quantempo_sample_options& given) {
  rt::Request request;
  if (given.batch != 0) request.batch = given.batch;
  if (given.labels != nullptr || given.labels_count != 0) {
    request.labels = values(given.labels, given.labels_count, "options.labels");
  }
  if (given.has_seed != 0) request.seed = given.seed;
  if (given.seeds != nullptr || given.seeds_count != 0) {
    request.seeds = values(given.seeds, given.seeds_count, "options.seeds");
  }
  if (given.guidance != nullptr || given.guidance_count != 0) {
    request.guidance = values(given.guidance, given.guidance_count, "options.guidance");
  }
  request.rescale = given.guidance_rescale;
  request.mode = word(given.guidance_mode);
  if (given.latents == nullptr && given.latents_count != 0) invalid("options.latents", "NULL with a count", "a pointer");
  request.latents = given.latents;
  request.latents_count = given.latents_count;
  if (given.arrays_count != 0) need(given.arrays, "options.arrays");
  for (std::size_t i = 0; i < given.arrays_count; ++i) {
    const quantempo_array& array = given.arrays[i];
    need(array.name, "options.arrays.name");
    need(array.dtype, "options.arrays.dtype");
    if (array.rank == 0 || array.rank > QUANTEMPO_MAX_RANK) {
      invalid("options.arrays.rank", std::to_string(array.rank), "1 to " + std::to_string(QUANTEMPO_MAX_RANK));
    }
    need(array.shape, "options.arrays.shape");
    request.arrays.push_back(
        {array.name, array.dtype, rt::Shape(array.shape, array.shape + array.rank), array.data, array.bytes});
  }
  return request;
}

}  // namespace

extern "C" {

QUANTEMPO_API uint32_t quantempo_abi_version(void) { return QUANTEMPO_ABI_VERSION; }

QUANTEMPO_API const char* quantempo_status_name(quantempo_status status) {
  return rt::kind_name(static_cast<rt::Kind>(status));
}

QUANTEMPO_API const char* quantempo_backends(void) {
  static const std::string names = rt::join(rt::backend_names(), ",");
  return names.c_str();
}

QUANTEMPO_API const char* quantempo_last_error(void) { return last_error.c_str(); }

QUANTEMPO_API void quantempo_open_options_defaults(quantempo_open_options* options) {
  if (options == nullptr) return;
  *options = {};
  options->size = sizeof *options;
}

QUANTEMPO_API quantempo_status quantempo_open(const char* path, const quantempo_open_options* options,
                                              quantempo_session** session) {
  return guarded([&] {
    need(session, "session");
    *session = nullptr;
    need(path, "path");
    const auto given = grown(options, quantempo_open_options_defaults, "options");
    rt::SessionOptions made;
    if (given.backend != nullptr) made.backend = given.backend;
    if (given.feature_cache != nullptr) made.feature_cache = given.feature_cache;
    made.dialect = word(given.dialect);
    made.engine.library = word(given.library);
    if (given.threads < 0) invalid("options.threads", std::to_string(given.threads), "0 or more");
    made.engine.threads = given.threads;
    if (given.settings_count != 0) need(given.settings, "options.settings");
    for (std::size_t i = 0; i < given.settings_count; ++i) {
      need(given.settings[i], "options.settings");
      const std::string setting = given.settings[i];
      const auto equals = setting.find('=');
      if (equals == std::string::npos) invalid("options.settings", rt::repr(setting), "key=value");
      made.engine.settings[setting.substr(0, equals)] = setting.substr(equals + 1);
    }
    if (given.notice != nullptr) {
      made.engine.notice = [notice = given.notice, user = given.notice_user](const std::string& name,
                                                                              const std::string& text) {
        notice(user, name.c_str(), text.c_str());
      };
    }
    *session = new quantempo_session(rt::Bundle::open(path), std::move(made));
  });
}

QUANTEMPO_API void quantempo_close(quantempo_session* session) { delete session; }

QUANTEMPO_API void quantempo_info_defaults(quantempo_info* info) {
  if (info == nullptr) return;
  *info = {};
  info->size = sizeof *info;
}

QUANTEMPO_API quantempo_status quantempo_get_info(const quantempo_session* session, quantempo_info* info) {
  return guarded([&] {
    need(session, "session");
    const auto& bundle = session->inner.bundle();
    const auto& manifest = bundle.manifest();
    quantempo_info made;
    quantempo_info_defaults(&made);
    made.name = manifest.name.c_str();
    made.precision = manifest.precision.c_str();
    made.scheduler = manifest.programs.scheduler.c_str();
    made.digest = bundle.digest().c_str();
    const auto& shape = manifest.denoiser.latents_shape;
    made.latents_rank = shape.size();
    for (std::size_t i = 0; i < shape.size() && i < QUANTEMPO_MAX_RANK; ++i) made.latents_shape[i] = shape[i];
    made.latents_count = rt::element_count(shape);
    made.classes = manifest.denoiser.classes.empty() ? 0 : manifest.denoiser.classes[0].count;
    made.default_steps = manifest.programs.default_steps;
    made.default_guidance = manifest.default_guidance;
    made.max_batch = manifest.denoiser.max_batch.value_or(0);
    made.has_decoder = manifest.decoder.graph ? 1 : 0;
    hand_out(made, info, "info");
  });
}

QUANTEMPO_API void quantempo_sample_options_defaults(quantempo_sample_options* options) {
  if (options == nullptr) return;
  *options = {};
  options->size = sizeof *options;
  options->decode = 1;
  options->preview_every = 1;
}

QUANTEMPO_API quantempo_status quantempo_sample(quantempo_session* session, const quantempo_sample_options* options,
                                                quantempo_result** result) {
  return guarded([&] {
    need(result, "result");
    *result = nullptr;
    need(session, "session");
    const auto given = grown(options, quantempo_sample_options_defaults, "options");
    rt::SampleOptions made;
    made.request = request_of(given);
    made.steps = given.steps;
    made.program = word(given.program);
    made.feature_cache = word(given.feature_cache);
    made.decode = given.decode != 0;
    made.preview_every = given.preview_every;
    if (given.on_step != nullptr) {
      made.on_step = [&given](std::int64_t step, std::int64_t steps, double timestep, std::vector<float>& latents) {
        const quantempo_step told_step = {sizeof(quantempo_step), step, steps, timestep, latents.data(), latents.size()};
        check_answer(given.on_step(given.user, &told_step), "on_step", step);
      };
    }
    if (given.on_preview != nullptr) {
      made.on_preview = [&given](std::int64_t step, const rt::Picture& picture) {
        const quantempo_image image = shown(picture);
        check_answer(given.on_preview(given.user, step, &image), "on_preview", step);
      };
    }
    auto held = std::make_unique<quantempo_result>();
    held->output = session->inner.sample(made);
    *result = held.release();
  });
}

QUANTEMPO_API quantempo_status quantempo_cancel(quantempo_session* session) {
  return guarded([&] {
    need(session, "session");
    session->inner.cancel();
  });
}

QUANTEMPO_API size_t quantempo_result_count(const quantempo_result* result) {
  return result == nullptr ? 0 : result->output.samples;
}

QUANTEMPO_API quantempo_status quantempo_result_image(const quantempo_result* result, size_t index,
                                                      quantempo_image* image) {
  return guarded([&] {
    need(result, "result");
    need(image, "image");
    *image = {};
    const auto& pictures = result->output.pictures;
    if (index >= pictures.size()) invalid("index", std::to_string(index), "below " + std::to_string(pictures.size()));
    *image = shown(pictures[index]);
  });
}

QUANTEMPO_API size_t quantempo_result_latents_count(const quantempo_result* result) {
  return result == nullptr ? 0 : result->output.loop.latents.size();
}

QUANTEMPO_API quantempo_status quantempo_result_latents(const quantempo_result* result, float* buffer, size_t count) {
  return guarded([&] {
    need(result, "result");
    need(buffer, "buffer");
    const auto& latents = result->output.loop.latents;
    if (count < latents.size()) {
      invalid("count", std::to_string(count), "at least " + std::to_string(latents.size()));
    }
    std::memcpy(buffer, latents.data(), latents.size() * sizeof *buffer);
  });
}

QUANTEMPO_API void quantempo_timings_defaults(quantempo_timings* timings) {
  if (timings == nullptr) return;
  *timings = {};
  timings->size = sizeof *timings;
}

QUANTEMPO_API quantempo_status quantempo_get_timings(const quantempo_result* result, quantempo_timings* timings) {
  return guarded([&] {
    need(result, "result");
    const auto& output = result->output;
    quantempo_timings made;
    quantempo_timings_defaults(&made);
    made.total = output.total_seconds;
    made.plan = output.loop.plan_seconds;
    made.loop = output.loop.total_seconds;
    made.engine = output.loop.engine_seconds;
    made.decode = output.decode_seconds;
    made.engine_calls = output.loop.engine_calls;
    made.rows = output.loop.rows;
    made.reused = output.loop.reused;
    made.seed = output.seed;
    hand_out(made, timings, "timings");
  });
}

QUANTEMPO_API quantempo_status quantempo_result_write_png(const quantempo_result* result, const char* path,
                                                          size_t columns) {
  return guarded([&] {
    need(result, "result");
    need(path, "path");
    const auto& pictures = result->output.pictures;
    if (pictures.empty()) invalid("result", "no images", "a result that was decoded");
    const std::string bytes = rt::encode_png(rt::grid(pictures, columns));
    rt::write_file(path, bytes);
  });
}

QUANTEMPO_API void quantempo_result_free(quantempo_result* result) { delete result; }

}  // extern "C"
