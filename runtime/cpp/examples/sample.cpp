// quantempo-sample: images from a bundle, on the command line.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "quantempo/quantempo.hpp"

namespace {

constexpr const char* kUsage = R"(usage: quantempo-sample BUNDLE [options]

  -o FILE               PNG to write; several images become a grid
  --latents FILE        write the final latents as raw float32
  --class N             class label; repeatable
  --count N             images per class (default 1)
  --seed N              the same seed gives the same picture (default 0)
  --steps N             default: the bundle's
  --guidance X          guidance scale, 1 is off; repeatable, one per image
  --rescale X           guidance rescale, 0 to 1
  --mode WORD           batched or split branches
  --cache WORD          feature caching: auto, none, or plan to refuse without one
  --program FILE        another sampler's step program (JSON)
  --engine NAME         backend (default ort)
  --library FILE        the engine's shared library
  --set KEY=VALUE       a setting of the engine; repeatable
  --dialect NAME        which denoiser graphs
  --threads N           of the engine; 0 lets it choose
  --repeat N            sample so many times, and time each (default 1)
  --preview PREFIX      write the first image after each step to PREFIX-N.ppm
  --quiet               no progress
)";

struct Arguments {
  std::string bundle, out, latents, preview;
  quantempo::OpenOptions open;
  quantempo::Options sample;
  std::size_t count = 1, repeat = 1;
  bool quiet = false;
};

[[noreturn]] void misused(const std::string& words) {
  std::cerr << words << "\n" << kUsage;
  std::exit(2);
}

template <typename Number>
Number number(const std::string& option, const std::string& text) {
  std::istringstream stream(text);
  Number value{};
  if (!(stream >> value) || !stream.eof()) misused(option + " " + text + ": not a number");
  return value;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) misused(path + ": cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

Arguments parse(int count, char** words) {
  Arguments found;
  found.sample.seed = 0;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--help" || word == "-h") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (word == "--quiet") {
      found.quiet = true;
      continue;
    }
    if (word.empty() || word[0] != '-') {
      if (!found.bundle.empty()) misused("two bundles: " + found.bundle + " and " + word);
      found.bundle = word;
      continue;
    }
    if (++i == count) misused(word + ": no value");
    const std::string value = words[i];
    if (word == "-o") found.out = value;
    else if (word == "--latents") found.latents = value;
    else if (word == "--preview") found.preview = value;
    else if (word == "--class") found.sample.labels.push_back(number<std::int64_t>(word, value));
    else if (word == "--count") found.count = number<std::size_t>(word, value);
    else if (word == "--repeat") found.repeat = number<std::size_t>(word, value);
    else if (word == "--seed") found.sample.seed = number<std::uint64_t>(word, value);
    else if (word == "--steps") found.sample.steps = number<std::int64_t>(word, value);
    else if (word == "--guidance") found.sample.guidance.push_back(number<double>(word, value));
    else if (word == "--rescale") found.sample.guidance_rescale = number<double>(word, value);
    else if (word == "--mode") found.sample.guidance_mode = value;
    else if (word == "--cache") found.sample.feature_cache = value;
    else if (word == "--program") found.sample.program = read(value);
    else if (word == "--engine") found.open.backend = value;
    else if (word == "--library") found.open.library = value;
    else if (word == "--set") found.open.settings.push_back(value);
    else if (word == "--dialect") found.open.dialect = value;
    else if (word == "--threads") found.open.threads = number<int>(word, value);
    else misused(word + ": unknown");
  }
  if (found.bundle.empty()) misused("no bundle");
  return found;
}

void write_preview(const std::string& prefix, std::int64_t step, const quantempo_image& image) {
  std::ofstream file(prefix + "-" + std::to_string(step) + ".ppm", std::ios::binary);
  file << (image.channels == 1 ? "P5" : "P6") << "\n" << image.width << " " << image.height << "\n255\n";
  file.write(reinterpret_cast<const char*>(image.pixels),
             static_cast<std::streamsize>(image.width * image.height * image.channels));
}

int run(Arguments& arguments) {
  arguments.open.notice = [](const std::string& name, const std::string& text) {
    std::cerr << name << ": " << text << "\n";
  };
  quantempo::Session session(arguments.bundle, arguments.open);
  quantempo::Options& options = arguments.sample;
  const auto classes = options.labels;
  std::size_t columns = 0;
  if (classes.empty()) {
    options.batch = static_cast<std::int64_t>(arguments.count);
  } else {
    options.labels.clear();
    for (const auto label : classes) options.labels.insert(options.labels.end(), arguments.count, label);
    if (options.labels.size() > arguments.count) columns = arguments.count;
  }
  options.decode = !arguments.out.empty();
  if (!arguments.quiet) {
    options.on_step = [](const quantempo_step& step) {
      std::fprintf(stderr, "\rstep %lld of %lld", static_cast<long long>(step.index) + 1, static_cast<long long>(step.steps));
      if (step.index + 1 == step.steps) std::fputc('\n', stderr);
      return quantempo::Go::On;
    };
  }
  if (!arguments.preview.empty()) {
    options.on_preview = [&](std::int64_t step, const quantempo_image& image) {
      write_preview(arguments.preview, step, image);
      return quantempo::Go::On;
    };
  }
  for (std::size_t i = 0; i < arguments.repeat; ++i) {
    const quantempo::Result result = session.sample(options);
    const auto timings = result.timings();
    std::printf("%zu images, %.3f s, %lld engine calls, %.1f us a call outside the engine, %lld of %lld evaluations reused\n",
                result.size(), timings.total, static_cast<long long>(timings.engine_calls),
                (timings.loop - timings.engine) * 1e6 / static_cast<double>(std::max<std::int64_t>(1, timings.engine_calls)),
                static_cast<long long>(timings.reused), static_cast<long long>(timings.rows));
    if (i + 1 < arguments.repeat) continue;
    if (!arguments.out.empty()) {
      result.write_png(arguments.out, columns);
      std::printf("wrote %s\n", arguments.out.c_str());
    }
    if (!arguments.latents.empty()) {
      const auto latents = result.latents();
      std::ofstream file(arguments.latents, std::ios::binary);
      file.write(reinterpret_cast<const char*>(latents.data()), static_cast<std::streamsize>(latents.size() * sizeof(float)));
      if (!file) misused(arguments.latents + ": cannot be written");
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  Arguments arguments = parse(count, words);
  try {
    return run(arguments);
  } catch (const quantempo::Error& error) {
    std::cerr << error.name() << ": " << error.what() << "\n";
    return 1;
  }
}
