// What a bundle must fulfil so that its cached programs can be replayed: manifest, vectors and programs.
#include <algorithm>
#include <set>

#include "bundle.hpp"

namespace quantempo::runtime {

namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& wanted,
                         const std::string& remedy = "compile the bundle again") {
  const bool place = where.find_first_of("/:") == std::string::npos;
  throw Error(Kind::BundleError, place ? std::string(kManifestName) + "." + where : where, found, wanted,
              "the bundle was changed by hand, or put together from two", remedy);
}

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

std::string graph(const GraphEntry& entry) { return "graphs, " + entry.file; }

std::set<std::string> dialects(const Manifest& manifest) {
  std::set<std::string> found;
  for (const auto& entry : manifest.graphs) found.insert(entry.second.dialect);
  return found;
}

bool caches(const Manifest& manifest) {
  return manifest.cache || std::any_of(manifest.graphs.begin(), manifest.graphs.end(), [](const auto& entry) {
           return !entry.second.reads.empty() || !entry.second.writes.empty();
         });
}

void check_read(const GraphEntry& entry, const std::string& feature,
                const std::map<std::string, const TensorSpec*>& written, const std::string& sample) {
  const TensorSpec* spec = find(entry.inputs, feature);
  if (spec == nullptr) refuse(graph(entry), "feature " + repr(feature) + " read", "an input of that name");
  const auto other = written.find(feature);
  if (other == written.end()) {
    std::vector<std::string> known;
    for (const auto& each : written) known.push_back(each.first);
    refuse(graph(entry), "feature " + repr(feature) + ", which no variant writes", "a variant that writes it",
           nearest(feature, known));
  }
  if (*spec != *other->second) {
    refuse(graph(entry), "feature " + repr(feature) + " as " + spec->dtype + " " + shown(spec->shape),
           other->second->dtype + " " + shown(other->second->shape) + ", as it is written");
  }
  const TensorSpec* rows = find(entry.inputs, sample);
  if (rows == nullptr) return;
  const bool same = spec->shape.empty() == rows->shape.empty() && (spec->shape.empty() || spec->shape[0] == rows->shape[0]);
  if (same) return;
  const std::string batch = rows->shape.empty() ? "none" : shown(rows->shape[0], false);
  refuse(graph(entry), "feature " + repr(feature) + " of shape " + shown(spec->shape),
         "rows of the batch (" + batch + ") first");
}

}  // namespace

std::map<std::string, const GraphEntry*> denoisers(const Manifest& manifest, const std::string& dialect) {
  std::vector<const GraphEntry*> found;
  for (const auto& [name, entry] : manifest.graphs) {
    const bool decoder = manifest.decoder.graph && *manifest.decoder.graph == name;
    const bool ends = find(entry.outputs, manifest.denoiser.prediction) || find(entry.outputs, kIndicator);
    if (!decoder && entry.dialect == dialect && ends) found.push_back(&entry);
  }
  std::stable_partition(found.begin(), found.end(), [](const GraphEntry* e) { return e->float_type == "float32"; });
  std::map<std::string, const GraphEntry*> chosen;
  for (const auto* entry : found) chosen.emplace(entry->variant, entry);
  return chosen;
}

void check_features(const Manifest& manifest) {
  const auto& required = manifest.requires_;
  const auto needs = [&](const char* feature, bool used) {
    if (!used || std::find(required.begin(), required.end(), feature) != required.end()) return;
    refuse("requires", "no " + repr(feature), repr(feature) + ", which the bundle uses");
  };
  needs("feature-cache-1", caches(manifest));
  needs("corrections-1", manifest.vectors.has_value());
  if (manifest.cache) {
    for (const auto& entry : manifest.cache->programs) {
      const std::string& steps = entry.first;
      const bool number = !steps.empty() && steps.size() <= 9 && (steps.size() == 1 || steps[0] != '0') &&
                          steps.find_first_not_of("0123456789") == std::string::npos;
      if (!number) refuse("cache.programs", "the key " + repr(steps), "a number of steps");
    }
  }
  for (const auto& dialect : dialects(manifest)) {
    const auto entries = denoisers(manifest, dialect);
    std::map<std::string, const TensorSpec*> written;
    for (const auto& each : entries) {
      for (const auto& feature : each.second->writes) {
        const TensorSpec* spec = find(each.second->outputs, feature);
        if (spec == nullptr) {
          refuse(graph(*each.second), "feature " + repr(feature) + " written", "an output of that name");
        }
        written[feature] = spec;
      }
    }
    for (const auto& each : entries) {
      for (const auto& feature : each.second->reads) {
        check_read(*each.second, feature, written, manifest.denoiser.sample_input);
      }
    }
  }
}

void check_cached(const Manifest& manifest, const std::string& steps, const std::string& file,
                  const StepProgram& program, const Vectors& vectors) {
  const auto same = [&](const char* what, const std::string& found, const std::string& wanted) {
    if (found != wanted) refuse(file + ": " + what, found, wanted + ", as in the manifest");
  };
  same("steps", std::to_string(program.steps), steps);
  same("scheduler", program.scheduler, manifest.programs.scheduler);
  // Of a dialect without variants one only learns that it has none: the richest one's refusal is told.
  std::optional<Error> refusal;
  std::size_t richest = 0;
  for (const auto& dialect : dialects(manifest)) {
    Variants variants;
    for (const auto& [name, entry] : denoisers(manifest, dialect)) variants.emplace(name, Variant::of(*entry));
    try {
      check_variants(program, variants, vectors, manifest.denoiser.latents_shape[0], file);
      return;
    } catch (const Error& error) {
      if (error.kind != Kind::DataError) throw;
      if (!refusal || variants.size() > richest) refusal.emplace(error), richest = variants.size();
    }
  }
  if (refusal) throw *refusal;
}

}  // namespace quantempo::runtime
