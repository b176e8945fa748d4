// The bundle's table of contents (docs/bundle-format.md).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "error.hpp"
#include "tensors.hpp"

namespace quantempo::runtime {

inline constexpr const char* kManifestName = "manifest.json";

struct FileEntry {
  std::string sha256;
  std::int64_t size = 0;
};

struct GraphEntry {
  std::string file;
  std::vector<std::string> data;
  std::string variant, dialect, float_type;
  std::vector<TensorSpec> inputs, outputs;
  std::vector<std::string> reads, writes;
};

struct ClassInput {
  std::string name;
  std::int64_t count = 0;
  std::optional<std::int64_t> null;
  std::map<std::string, std::string> names;
};

struct ArrayInput {
  std::string name, dtype;
  std::vector<Dimension> shape;
  bool guided = true;
};

// An input whose contents are part of the graphs, which do not take it; a caller who passes it must pass these.
struct PinnedInput {
  std::string name, dtype;
  Shape shape;                 // per sample
  std::vector<double> values;  // flattened
};

struct Denoiser {
  Shape latents_shape;
  std::vector<ClassInput> classes;
  std::vector<ArrayInput> arrays;
  std::vector<PinnedInput> pinned;
  std::string sample_input = "sample", timestep_input = "timestep", prediction = "prediction";
  std::optional<std::string> group_input;
  std::optional<std::int64_t> max_batch;
};

struct Decoder {
  std::optional<std::string> graph;
  double scaling = 1.0, shift = 0.0;
};

struct ProgramIndex {
  std::string scheduler, config;
  std::map<std::string, std::string> files;
  std::string scheduler_file;
  std::int64_t default_steps = 20;
};

struct CacheIndex {
  std::string plan;
  std::map<std::string, std::string> programs;
};

// Half-open intervals of the group key that tile the line.
struct Partition {
  std::vector<double> edges;
  double low = 0, high = 0;
  std::string unit = "timestep";

  std::int64_t group_of(double key) const;
  // Whether a key lies within what was calibrated, up to half a typical interval.
  bool calibrated(double key) const;
};

struct Manifest {
  std::string name, precision;
  std::vector<std::string> requires_;
  std::map<std::string, FileEntry> files;
  std::map<std::string, GraphEntry> graphs;
  Denoiser denoiser;
  Decoder decoder;
  ProgramIndex programs;
  std::optional<Partition> partition;
  std::optional<std::string> tables, plan, vectors;
  std::optional<CacheIndex> cache;
  double default_guidance = 1.0;

  std::vector<std::string> file_names() const;
  std::vector<std::string> graph_names() const;
};

// Reads a manifest: version and features first, then closed.
Manifest parse_manifest(const std::string& text);

}  // namespace quantempo::runtime
