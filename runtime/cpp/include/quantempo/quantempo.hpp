// quantempo: samples images from a bundle.  A thin C++17 wrapper of quantempo.h: handles that free themselves, errors
// as exceptions, callbacks as functions that may throw.  Header only; the library behind it is the C one.
#ifndef QUANTEMPO_HPP
#define QUANTEMPO_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "quantempo.h"

namespace quantempo {

class Error : public std::runtime_error {
 public:
  Error(quantempo_status status, const std::string& words) : std::runtime_error(words), status_(status) {}
  quantempo_status status() const { return status_; }
  // `BundleError`, `RequestError` and so on, as in the Python package.
  const char* name() const { return quantempo_status_name(status_); }

 private:
  quantempo_status status_;
};

inline void check(quantempo_status status) {
  if (status != QUANTEMPO_OK) throw Error(status, quantempo_last_error());
}

struct OpenOptions {
  std::string backend = "ort", library, dialect, feature_cache = "auto";
  int threads = 0;
  std::vector<std::string> settings;  // "key=value"
  // Must not throw.
  std::function<void(const std::string& name, const std::string& text)> notice;
};

// What a callback answers; to throw is a third way to end a run.
enum class Go { On, Cancel };

struct Options {
  std::int64_t batch = 0, steps = 0;
  std::vector<std::int64_t> labels;
  std::optional<std::uint64_t> seed;
  std::vector<std::uint64_t> seeds;
  std::vector<double> guidance;
  double guidance_rescale = 0.0;
  std::string guidance_mode, feature_cache, program;
  std::vector<float> latents;
  std::vector<quantempo_array> arrays;
  bool decode = true;
  std::function<Go(const quantempo_step& step)> on_step;
  std::function<Go(std::int64_t step, const quantempo_image& image)> on_preview;
  std::int64_t preview_every = 1;
};

class Result {
 public:
  explicit Result(quantempo_result* handle) : handle_(handle, quantempo_result_free) {}

  std::size_t size() const { return quantempo_result_count(handle_.get()); }
  // Points into the result.
  quantempo_image image(std::size_t index) const {
    quantempo_image image{};
    check(quantempo_result_image(handle_.get(), index, &image));
    return image;
  }
  std::vector<float> latents() const {
    std::vector<float> values(quantempo_result_latents_count(handle_.get()));
    check(quantempo_result_latents(handle_.get(), values.data(), values.size()));
    return values;
  }
  quantempo_timings timings() const {
    quantempo_timings timings;
    quantempo_timings_defaults(&timings);
    check(quantempo_get_timings(handle_.get(), &timings));
    return timings;
  }
  void write_png(const std::string& path, std::size_t columns = 0) const {
    check(quantempo_result_write_png(handle_.get(), path.c_str(), columns));
  }

 private:
  std::unique_ptr<quantempo_result, void (*)(quantempo_result*)> handle_;
};

class Session {
 public:
  explicit Session(const std::string& path, OpenOptions options = {})
      : notice_(std::make_unique<decltype(options.notice)>(std::move(options.notice))), handle_(nullptr, quantempo_close) {
    quantempo_open_options raw;
    quantempo_open_options_defaults(&raw);
    raw.backend = options.backend.c_str();
    raw.library = text(options.library);
    raw.dialect = text(options.dialect);
    raw.feature_cache = options.feature_cache.c_str();
    raw.threads = options.threads;
    std::vector<const char*> settings;
    for (const auto& setting : options.settings) settings.push_back(setting.c_str());
    raw.settings = settings.data();
    raw.settings_count = settings.size();
    if (*notice_) {
      raw.notice = [](void* user, const char* name, const char* words) {
        (*static_cast<decltype(options.notice)*>(user))(name, words);
      };
      raw.notice_user = notice_.get();
    }
    quantempo_session* handle = nullptr;
    check(quantempo_open(path.c_str(), &raw, &handle));
    handle_.reset(handle);
  }

  quantempo_info info() const {
    quantempo_info info;
    quantempo_info_defaults(&info);
    check(quantempo_get_info(handle_.get(), &info));
    return info;
  }

  Result sample(const Options& options) {
    quantempo_sample_options raw;
    quantempo_sample_options_defaults(&raw);
    raw.batch = options.batch;
    raw.steps = options.steps;
    raw.labels = data(options.labels);
    raw.labels_count = options.labels.size();
    raw.has_seed = options.seed ? 1 : 0;
    raw.seed = options.seed.value_or(0);
    raw.seeds = data(options.seeds);
    raw.seeds_count = options.seeds.size();
    raw.guidance = data(options.guidance);
    raw.guidance_count = options.guidance.size();
    raw.guidance_rescale = options.guidance_rescale;
    raw.guidance_mode = text(options.guidance_mode);
    raw.feature_cache = text(options.feature_cache);
    raw.program = text(options.program);
    raw.latents = data(options.latents);
    raw.latents_count = options.latents.size();
    raw.arrays = data(options.arrays);
    raw.arrays_count = options.arrays.size();
    raw.decode = options.decode ? 1 : 0;
    raw.preview_every = options.preview_every;
    // An exception of a callback must not cross the C code: it waits here until the call is over.
    struct Callbacks {
      const Options* options;
      std::exception_ptr thrown;
    } callbacks{&options, nullptr};
    raw.user = &callbacks;
    if (options.on_step) {
      raw.on_step = [](void* user, const quantempo_step* step) {
        return answer(*static_cast<Callbacks*>(user), [&](const Options& given) { return given.on_step(*step); });
      };
    }
    if (options.on_preview) {
      raw.on_preview = [](void* user, std::int64_t index, const quantempo_image* image) {
        return answer(*static_cast<Callbacks*>(user),
                      [&](const Options& given) { return given.on_preview(index, *image); });
      };
    }
    quantempo_result* handle = nullptr;
    const quantempo_status status = quantempo_sample(handle_.get(), &raw, &handle);
    if (callbacks.thrown) std::rethrow_exception(callbacks.thrown);
    check(status);
    return Result(handle);
  }

  // From any thread.
  void cancel() { check(quantempo_cancel(handle_.get())); }

 private:
  static const char* text(const std::string& word) { return word.empty() ? nullptr : word.c_str(); }
  template <typename T>
  static const T* data(const std::vector<T>& values) {
    return values.empty() ? nullptr : values.data();
  }
  template <typename Callbacks, typename Call>
  static std::int32_t answer(Callbacks& callbacks, const Call& call) {
    try {
      return call(*callbacks.options) == Go::On ? 0 : 1;
    } catch (...) {
      callbacks.thrown = std::current_exception();
      return -1;
    }
  }

  std::unique_ptr<std::function<void(const std::string&, const std::string&)>> notice_;
  std::unique_ptr<quantempo_session, void (*)(quantempo_session*)> handle_;
};

}  // namespace quantempo

#endif
