// Opens a bundle directory and proves it before anything is loaded.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "program.hpp"
#include "variants.hpp"

namespace quantempo::runtime {

// The denoiser graphs of one dialect by variant, float32 before narrower types; probes are among them.
std::map<std::string, const GraphEntry*> denoisers(const Manifest& manifest, const std::string& dialect);

// Refuses a manifest that points at unlisted files, at places where a bundle's files may not lie, or whose graphs'
// features do not fit together.
void check_references(const Manifest& manifest);

// The part of `check_references` about features and vectors.
void check_features(const Manifest& manifest);

// Refuses a path that is not plainly relative.
void check_path(const std::string& name, const std::string& where);

// Refuses a cached program that none of the bundle's dialects can replay, or that lies under another step count.
void check_cached(const Manifest& manifest, const std::string& steps, const std::string& file,
                  const StepProgram& program, const Vectors& vectors);

// A verified bundle.
class Bundle {
 public:
  // Verifies digests too.  Throws `Error` with the names of the Python reader.
  static Bundle open(const std::string& path);

  const std::string& root() const { return root_; }
  const Manifest& manifest() const { return manifest_; }
  const std::string& digest() const { return digest_; }
  const Vectors& vectors() const { return vectors_; }

  std::string path(const std::string& name) const;
  // The step program of the bundle's own scheduler.  Throws `RequestError` that names the nearest.
  StepProgram program(std::int64_t steps) const;
  const std::map<std::int64_t, StepProgram>& cached() const { return cached_; }

 private:
  Bundle(std::string root, Manifest manifest, std::string digest);
  void check_files() const;
  void check_strangers(const std::string& folder) const;
  StepProgram load_program(const std::string& name) const;

  std::string root_;
  Manifest manifest_;
  std::string digest_;
  Vectors vectors_;
  std::map<std::int64_t, StepProgram> cached_;
};

}  // namespace quantempo::runtime
