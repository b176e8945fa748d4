// The C interface and its wrapper, exercised from inside: null and short arguments, callbacks, threads, cancelling.
//
//     quantempo-interface BUNDLE LIBRARY OLD_ENGINE
//
// BUNDLE has class labels, an input `mask` pinned to 1 1 0, a decoder, five steps by default and graphs for LIBRARY.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "quantempo/quantempo.hpp"

namespace {

int failures = 0;

void expect(bool right, const char* what, int line) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "line %d: %s\n  last error: %s\n", line, what, quantempo_last_error());
}
#define EXPECT(condition) expect(static_cast<bool>(condition), #condition, __LINE__)

bool said(const char* words) { return std::strstr(quantempo_last_error(), words) != nullptr; }

const char* bundle;
const char* library;

quantempo_session* opened() {
  quantempo_open_options options;
  quantempo_open_options_defaults(&options);
  options.library = library;
  options.threads = 1;
  quantempo_session* session = nullptr;
  if (quantempo_open(bundle, &options, &session) != QUANTEMPO_OK) {
    std::fprintf(stderr, "%s\n", quantempo_last_error());
    std::exit(1);
  }
  return session;
}

constexpr std::int64_t kLabel = 1;

quantempo_sample_options plain() {
  quantempo_sample_options options;
  quantempo_sample_options_defaults(&options);
  options.labels = &kLabel;
  options.labels_count = 1;
  options.has_seed = 1;
  options.seed = 7;
  options.decode = 0;
  return options;
}

std::vector<float> latents_of(quantempo_session* session, const quantempo_sample_options& options) {
  quantempo_result* result = nullptr;
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_OK);
  std::vector<float> values(quantempo_result_latents_count(result));
  EXPECT(quantempo_result_latents(result, values.data(), values.size()) == QUANTEMPO_OK);
  quantempo_result_free(result);
  return values;
}

void null_pointers() {
  quantempo_session* session = nullptr;
  quantempo_result* result = nullptr;
  EXPECT(quantempo_open(nullptr, nullptr, &session) == QUANTEMPO_INVALID_ARGUMENT && said("path: found NULL"));
  EXPECT(quantempo_open(bundle, nullptr, nullptr) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_sample(nullptr, nullptr, &result) == QUANTEMPO_INVALID_ARGUMENT && said("session"));
  EXPECT(quantempo_cancel(nullptr) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_get_info(nullptr, nullptr) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_get_timings(nullptr, nullptr) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_result_image(nullptr, 0, nullptr) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_result_latents(nullptr, nullptr, 0) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_result_write_png(nullptr, nullptr, 0) == QUANTEMPO_INVALID_ARGUMENT);
  EXPECT(quantempo_result_count(nullptr) == 0 && quantempo_result_latents_count(nullptr) == 0);
  quantempo_open_options_defaults(nullptr);
  quantempo_sample_options_defaults(nullptr);
  quantempo_info_defaults(nullptr);
  quantempo_timings_defaults(nullptr);
  quantempo_close(nullptr);
  quantempo_result_free(nullptr);
  EXPECT(std::string(quantempo_status_name(static_cast<quantempo_status>(99))) == "Unknown");
}

void struct_sizes(quantempo_session* session) {
  auto options = plain();
  quantempo_result* result = nullptr;
  for (const std::size_t size : {std::size_t{0}, std::size_t{4}, std::size_t{1} << 20}) {
    options.size = size;
    EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_INVALID_ARGUMENT && said("options.size"));
    EXPECT(result == nullptr);
  }
  // A program that was built when the struct ended after the seed.
  auto older = plain();
  older.size = offsetof(quantempo_sample_options, seeds);
  older.guidance_count = 5;
  older.on_step = reinterpret_cast<quantempo_on_step>(std::uintptr_t{1});
  older.decode = 0;
  EXPECT(quantempo_sample(session, &older, &result) == QUANTEMPO_OK);
  quantempo_result_free(result);
  quantempo_info info;
  std::memset(&info, 0x55, sizeof info);
  info.size = offsetof(quantempo_info, latents_shape);
  EXPECT(quantempo_get_info(session, &info) == QUANTEMPO_OK && info.digest != nullptr);
  EXPECT(info.latents_rank == 0x5555555555555555u);  // behind what the caller knows
}

void bad_requests(quantempo_session* session) {
  quantempo_result* result = nullptr;
  const auto refused = [&](quantempo_sample_options options, quantempo_status status, const char* words) {
    const auto found = quantempo_sample(session, &options, &result);
    if (found == status && said(words) && result == nullptr) return true;
    std::fprintf(stderr, "%s: %s\n", quantempo_status_name(found), quantempo_last_error());
    return false;
  };
  auto options = plain();
  const std::int64_t label = 1 << 20;
  options.labels = &label;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "nearest legal label"));
  options = plain();
  options.labels = nullptr;
  EXPECT(refused(options, QUANTEMPO_INVALID_ARGUMENT, "options.labels"));
  options = plain();
  options.steps = 12345;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "nearest in the bundle"));
  options = plain();
  options.steps = INT64_MIN;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "num_inference_steps"));
  options = plain();
  const double scales[] = {NAN, -1.0};
  options.guidance = scales;
  options.guidance_count = 1;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "guidance_scale"));
  options.guidance_count = SIZE_MAX;
  EXPECT(refused(options, QUANTEMPO_INVALID_ARGUMENT, "options.guidance"));
  options = plain();
  const float few[] = {0.0f};
  options.latents = few;
  options.latents_count = 1;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "latents: found 1 numbers"));
  options = plain();
  options.batch = -1;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "samples"));
  options = plain();
  options.guidance_mode = "fast";
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "'batched' or 'split'"));
  options = plain();
  options.feature_cache = "never";
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "'auto', 'none' or 'plan'"));
  options = plain();
  options.program = "{";
  EXPECT(refused(options, QUANTEMPO_DATA_ERROR, "not JSON"));
  options = plain();
  const std::int64_t shape[] = {1, 3};
  quantempo_array array = {"nothing", "float32", shape, 2, few, 4};
  options.arrays = &array;
  options.arrays_count = 1;
  EXPECT(refused(options, QUANTEMPO_REQUEST_ERROR, "an unknown argument 'nothing'"));
  array.rank = 99;
  EXPECT(refused(options, QUANTEMPO_INVALID_ARGUMENT, "rank"));
}

// The bundle's graphs were made for the mask 1 1 0, and do not take it.
void pinned_inputs(quantempo_session* session) {
  const auto free = latents_of(session, plain());
  const std::int64_t one[] = {3}, rows[] = {2, 3};
  const std::int64_t mask[] = {1, 1, 0}, masks[] = {1, 1, 0, 1, 1, 1};
  const float loose[] = {1.0f, 1.0f, 0.0f};
  auto options = plain();
  options.arrays_count = 1;
  quantempo_array array = {"mask", "int64", one, 1, mask, sizeof mask};
  options.arrays = &array;
  EXPECT(latents_of(session, options) == free);
  array = {"mask", "float32", one, 1, loose, sizeof loose};
  EXPECT(latents_of(session, options) == free);
  const auto refused = [&](const quantempo_array& given) {
    array = given;
    quantempo_result* result = nullptr;
    return quantempo_sample(session, &options, &result) == QUANTEMPO_REQUEST_ERROR &&
           said("call, mask: found other contents, wanted [1 1 0] in every row");
  };
  EXPECT(refused({"mask", "int64", rows, 2, masks, sizeof masks}));
  EXPECT(refused({"mask", "int64", one, 1, mask, 8}));
  EXPECT(refused({"mask", "int64", one, 1, nullptr, sizeof mask}));
  EXPECT(refused({"mask", "float16", one, 1, mask, 6}));
  const std::int64_t two[] = {2};
  EXPECT(refused({"mask", "int64", two, 1, mask, 16}));
}

void results(quantempo_session* session) {
  const auto options = plain();
  quantempo_result* result = nullptr;
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_OK);
  EXPECT(std::strlen(quantempo_last_error()) == 0);
  float small[1];
  EXPECT(quantempo_result_latents(result, small, 1) == QUANTEMPO_INVALID_ARGUMENT && said("at least"));
  quantempo_image image;
  EXPECT(quantempo_result_image(result, 0, &image) == QUANTEMPO_INVALID_ARGUMENT && image.pixels == nullptr);
  EXPECT(quantempo_result_write_png(result, "/nowhere/out.png", 0) == QUANTEMPO_INVALID_ARGUMENT);
  quantempo_timings timings;
  quantempo_timings_defaults(&timings);
  EXPECT(quantempo_get_timings(result, &timings) == QUANTEMPO_OK && timings.engine_calls > 1 && timings.seed == 7);
  quantempo_result_free(result);
}

void callbacks(quantempo_session* session) {
  auto options = plain();
  quantempo_result* result = nullptr;
  std::int32_t answer = 5;
  options.user = &answer;
  options.on_step = [](void* user, const quantempo_step* step) {
    return step->index == 0 ? 0 : *static_cast<std::int32_t*>(user);
  };
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_CALLBACK_FAILED && said("on_step after step 1: found 5"));
  answer = 1;
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_CANCELLED && result == nullptr);
  const auto untouched = latents_of(session, plain());
  options.on_step = [](void*, const quantempo_step* step) {
    if (step->index + 1 == step->steps) std::fill_n(step->latents, step->latents_count, 2.5f);
    return 0;
  };
  const auto replaced = latents_of(session, options);
  EXPECT(std::all_of(replaced.begin(), replaced.end(), [](float v) { return v == 2.5f; }));
  EXPECT(latents_of(session, plain()) == untouched);
}

struct Previews {
  std::vector<std::int64_t> steps;
  std::vector<std::uint8_t> last;
  std::int64_t answer_at = -1;
  std::int32_t answer = 0;
};

std::vector<std::uint8_t> pixels_of(const quantempo_image& image) {
  return {image.pixels, image.pixels + image.width * image.height * image.channels};
}

void previews(quantempo_session* session) {
  const auto untouched = latents_of(session, plain());
  auto options = plain();
  Previews seen;
  options.user = &seen;
  options.steps = 5;
  options.decode = 1;
  options.on_preview = [](void* user, std::int64_t step, const quantempo_image* image) {
    auto& told = *static_cast<Previews*>(user);
    told.steps.push_back(step);
    told.last = pixels_of(*image);
    return step == told.answer_at ? told.answer : 0;
  };
  quantempo_result* result = nullptr;
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_OK);
  EXPECT((seen.steps == std::vector<std::int64_t>{0, 1, 2, 3, 4}));
  quantempo_image image;
  EXPECT(quantempo_result_image(result, 0, &image) == QUANTEMPO_OK && image.channels == 3 && image.width == 8);
  EXPECT(pixels_of(image) == seen.last);  // after the last step the preview is the picture
  std::vector<float> latents(quantempo_result_latents_count(result));
  EXPECT(quantempo_result_latents(result, latents.data(), latents.size()) == QUANTEMPO_OK && latents == untouched);
  quantempo_result_free(result);
  seen = {};
  options.preview_every = 2;
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_OK);
  EXPECT((seen.steps == std::vector<std::int64_t>{1, 3}));
  quantempo_result_free(result);
  seen = {{}, {}, 3, 9};
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_CALLBACK_FAILED && result == nullptr);
  EXPECT(said("on_preview after step 3: found 9") && (seen.steps == std::vector<std::int64_t>{1, 3}));
  seen = {{}, {}, 1, 1};
  EXPECT(quantempo_sample(session, &options, &result) == QUANTEMPO_CANCELLED && result == nullptr);
  EXPECT((seen.steps == std::vector<std::int64_t>{1}));
  EXPECT(latents_of(session, plain()) == untouched);
}

void wrapper() {
  quantempo::OpenOptions open;
  open.library = library;
  open.threads = 1;
  quantempo::Session session(bundle, open);
  quantempo::Options options;
  options.labels = {kLabel};
  options.seed = 7;
  options.on_step = [](const quantempo_step& step) -> quantempo::Go {
    if (step.index == 1) throw std::logic_error("enough");
    return quantempo::Go::On;
  };
  std::string caught;
  try {
    session.sample(options);
  } catch (const std::logic_error& error) {
    caught = error.what();
  }
  EXPECT(caught == "enough");
  options.on_step = nullptr;
  options.on_preview = [](std::int64_t, const quantempo_image&) -> quantempo::Go { throw std::logic_error("unseen"); };
  try {
    session.sample(options);
  } catch (const std::logic_error& error) {
    caught = error.what();
  }
  EXPECT(caught == "unseen");
  options.on_preview = nullptr;
  const auto moved = session.sample(options);
  EXPECT(moved.size() == 1 && !moved.latents().empty());
  options.labels = {-1};
  try {
    session.sample(options);
    EXPECT(false);
  } catch (const quantempo::Error& error) {
    EXPECT(std::string(error.name()) == "RequestError");
  }
}

void two_threads_on_one_handle(quantempo_session* session) {
  const auto wanted = latents_of(session, plain());
  auto other = plain();
  other.seed = 8;
  const auto wanted_other = latents_of(session, other);
  std::atomic<int> right{0};
  const auto work = [&](const quantempo_sample_options& options, const std::vector<float>& expected) {
    for (int i = 0; i < 3; ++i) {
      quantempo_result* result = nullptr;
      if (quantempo_sample(session, &options, &result) != QUANTEMPO_OK) return;
      std::vector<float> found(quantempo_result_latents_count(result));
      quantempo_result_latents(result, found.data(), found.size());
      quantempo_result_free(result);
      if (found == expected) ++right;
      // An error of one thread is not another's.
      quantempo_result* none = nullptr;
      quantempo_sample(session, nullptr, &none);
    }
  };
  std::thread one([&] { work(plain(), wanted); }), two([&] { work(other, wanted_other); });
  one.join();
  two.join();
  EXPECT(right == 6);
}

void cancelling_from_another_thread(quantempo_session* session) {
  struct Shared {
    std::atomic<bool> running{false}, cancelled{false};
  } shared;
  auto options = plain();
  options.user = &shared;
  options.on_step = [](void* user, const quantempo_step*) {
    auto& state = *static_cast<Shared*>(user);
    state.running = true;
    while (!state.cancelled) std::this_thread::yield();
    return 0;
  };
  quantempo_status status = QUANTEMPO_OK;
  quantempo_result* result = nullptr;
  std::thread worker([&] { status = quantempo_sample(session, &options, &result); });
  while (!shared.running) std::this_thread::yield();
  EXPECT(quantempo_cancel(session) == QUANTEMPO_OK);
  shared.cancelled = true;
  worker.join();
  EXPECT(status == QUANTEMPO_CANCELLED && result == nullptr);
  EXPECT(!latents_of(session, plain()).empty());  // the next call is not cancelled
}

void a_handle_per_thread() {
  std::vector<std::vector<float>> found(2);
  std::vector<std::thread> threads;
  for (auto& out : found) {
    threads.emplace_back([&out] {
      quantempo_session* session = opened();
      out = latents_of(session, plain());
      quantempo_close(session);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT(found[0] == found[1] && !found[0].empty());
}

void engine_libraries(const char* old_engine) {
  quantempo_open_options options;
  quantempo_open_options_defaults(&options);
  quantempo_session* session = nullptr;
  options.library = old_engine;
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_ENGINE_ERROR);
  EXPECT(said("ONNX Runtime 1.4.0") && said("ONNX Runtime 1.18 or newer"));
  options.library = "libz.so.1";
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_ENGINE_ERROR && said("OrtGetApiBase"));
  options.library = "/nowhere/libonnxruntime.so";
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_ENGINE_ERROR && said("no library that opens"));
  options.library = library;
  options.backend = "onnx";
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_ENGINE_ERROR && said("'onnx'"));
  options.backend = nullptr;
  const char* settings[] = {"optimisation=all"};
  options.settings = settings;
  options.settings_count = 1;
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_ENGINE_ERROR && said("did you mean 'optimization'"));
  settings[0] = "nonsense";
  EXPECT(quantempo_open(bundle, &options, &session) == QUANTEMPO_INVALID_ARGUMENT && said("key=value"));
  EXPECT(session == nullptr);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s BUNDLE LIBRARY OLD_ENGINE\n", words[0]);
    return 2;
  }
  bundle = words[1];
  library = words[2];
  null_pointers();
  quantempo_session* session = opened();
  struct_sizes(session);
  bad_requests(session);
  pinned_inputs(session);
  results(session);
  callbacks(session);
  previews(session);
  two_threads_on_one_handle(session);
  cancelling_from_another_thread(session);
  quantempo_close(session);
  wrapper();
  a_handle_per_thread();
  engine_libraries(words[3]);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
