#include "bundle.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>

#include "files.hpp"
#include "safetensors.hpp"
#include "sha256.hpp"

namespace quantempo::runtime {

namespace fs = std::filesystem;

namespace {

constexpr std::array<const char*, 3> kSidecars = {"engines", "report", "reference"};
constexpr std::array<const char*, 3> kLoose = {"README.md", "LICENSE", "LICENSE.txt"};
constexpr std::size_t kLargestText = std::size_t{256} << 20;

bool sidecar(const std::string& name) {
  return std::any_of(kSidecars.begin(), kSidecars.end(), [&](const char* word) { return name == word; });
}

[[noreturn]] void refuse_link(const std::string& name, const std::string& step) {
  throw Error(Kind::UnsafePath, name, repr(step) + " is a link", "a plain file in plain folders",
              "the bundle was put together by hand", "copy the file to where the link is");
}

[[noreturn]] void refuse_unlisted(const std::string& where, const std::string& name, const Manifest& manifest) {
  throw Error(Kind::BundleError, where, repr(name) + ", which the manifest does not list",
              "a file with size and digest in `files`", "the manifest was changed by hand",
              nearest(name, manifest.file_names()));
}

// (place in the manifest, file) of every file that the manifest points to.
std::vector<std::pair<std::string, std::string>> references(const Manifest& manifest) {
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& [name, graph] : manifest.graphs) {
    found.emplace_back("graphs." + name + ".file", graph.file);
    for (const auto& file : graph.data) found.emplace_back("graphs." + name + ".data", file);
  }
  for (const auto& [steps, file] : manifest.programs.files) found.emplace_back("programs.files." + steps, file);
  found.emplace_back("programs.scheduler_file", manifest.programs.scheduler_file);
  if (manifest.tables) found.emplace_back("tables", *manifest.tables);
  if (manifest.plan) found.emplace_back("plan", *manifest.plan);
  if (manifest.vectors) found.emplace_back("vectors", *manifest.vectors);
  if (manifest.cache) {
    found.emplace_back("cache.plan", manifest.cache->plan);
    for (const auto& [steps, file] : manifest.cache->programs) found.emplace_back("cache.programs." + steps, file);
  }
  return found;
}

void check_links(const std::string& root, const std::string& name) {
  std::size_t end = 0;
  do {
    end = name.find('/', end + 1);  // a checked path begins with no slash
    const std::string step = name.substr(0, end);
    if (file_type(root + "/" + step) == FileType::Link) refuse_link(name, step);
  } while (end != std::string::npos);
}

void check_file(const std::string& root, const std::string& name, const FileEntry& entry) {
  const std::string path = root + "/" + name;
  if (file_type(path) != FileType::Regular) {
    throw Error(Kind::BundleError, name, "no such file", "a file of " + std::to_string(entry.size) + " bytes",
                "the bundle was copied incompletely", "copy or compile it again");
  }
  std::error_code failed;
  const auto size = static_cast<std::int64_t>(fs::file_size(path, failed));
  if (failed || size != entry.size) {
    throw Error(Kind::DigestMismatch, name, std::to_string(size) + " bytes", std::to_string(entry.size) + " bytes",
                std::string("the file was ") + (size < entry.size ? "cut short" : "changed"),
                "copy or compile the bundle again");
  }
  const std::string found = file_digest(path, name);
  if (found != entry.sha256) {
    throw Error(Kind::DigestMismatch, name, "SHA-256 " + found, "SHA-256 " + entry.sha256,
                "the file was changed after the bundle was written", "copy or compile the bundle again");
  }
}

// Ascending numbers as people write them: `1 to 5, 10, 20`.
std::string ranges(const std::vector<std::int64_t>& numbers) {
  std::vector<std::string> runs;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    runs.push_back(std::to_string(numbers[i]) + (last == i ? "" : " to " + std::to_string(numbers[last])));
    i = last + 1;
  }
  return runs.empty() ? "none" : join(runs);
}

// A decimal string as a number; -1 where it is none, or is not written as a number writes itself.
std::int64_t count_of(const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) return -1;
  return text.size() > 1 && text[0] == '0' ? -1 : std::strtol(text.c_str(), nullptr, 10);
}

}  // namespace

void check_path(const std::string& name, const std::string& where) {
  const bool odd = name.find_first_of(std::string("\\:\0", 3)) != std::string::npos;
  bool plain = !odd && !name.empty() && name.front() != '/';
  for (std::size_t start = 0; plain && start <= name.size();) {
    const auto end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    plain = !part.empty() && part != "." && part != "..";
    start = end + 1;
  }
  if (plain) return;
  throw Error(Kind::UnsafePath, where, "the path " + repr(name), "a path below the bundle, with forward slashes",
              "the manifest was changed by hand or made to reach other files", "do not use this bundle");
}

Bundle::Bundle(std::string root, Manifest manifest, std::string digest)
    : root_(std::move(root)), manifest_(std::move(manifest)), digest_(std::move(digest)) {}

Bundle Bundle::open(const std::string& path) {
  const std::string file = path + "/" + kManifestName;
  const FileType type = file_type(file);
  std::error_code failed;
  const bool folder = fs::is_directory(path, failed);
  if (type == FileType::Link) refuse_link(kManifestName, kManifestName);
  if (!folder || type != FileType::Regular) {
    throw Error(Kind::BundleError, path, folder ? std::string("no ") + kManifestName : "no such directory",
                "a bundle directory", "a wrong path, or a compile that did not finish",
                "give the directory that `quantempo compile -o` wrote");
  }
  const std::string text = read_file(file, kManifestName, kLargestText);
  Manifest manifest = parse_manifest(text);
  check_references(manifest);
  for (const auto& entry : manifest.files) check_links(path, entry.first);
  Bundle bundle(path, std::move(manifest), digest_of(text));
  bundle.check_files();
  const auto& made = bundle.manifest_;
  if (made.vectors) bundle.vectors_ = read_vectors(read_file(bundle.path(*made.vectors), *made.vectors, kLargestText), *made.vectors);
  if (made.tables && made.partition) {
    check_scale_table(read_file(bundle.path(*made.tables), *made.tables, kLargestText), *made.tables,
                      made.partition->edges.size() + 1);
  }
  if (made.cache) {
    std::map<std::int64_t, std::string> ascending;
    for (const auto& [steps, name] : made.cache->programs) ascending.emplace(count_of(steps), name);
    for (const auto& [steps, name] : ascending) {
      StepProgram program = bundle.load_program(name);
      check_cached(made, std::to_string(steps), name, program, bundle.vectors_);
      bundle.cached_.emplace(steps, std::move(program));
    }
  }
  return bundle;
}

void Bundle::check_files() const {
  for (const auto& [name, entry] : manifest_.files) check_file(root_, name, entry);
  check_strangers("");
}

// An unlisted file could be reached by a graph; a link to a folder could hide many.
void Bundle::check_strangers(const std::string& folder) const {
  std::error_code failed;
  for (fs::directory_iterator at(root_ + "/" + folder, failed), end; !failed && at != end; at.increment(failed)) {
    const std::string name = at->path().filename().string();
    const bool top = folder.empty();
    const std::string inner = top ? name : folder + "/" + name;
    std::error_code unknown;
    if (at->is_directory(unknown)) {  // follows links, as a graph would
      if (top && (sidecar(name) || name[0] == '.')) continue;
      if (at->is_symlink(unknown)) refuse_link(inner, inner);
      check_strangers(inner);
      continue;
    }
    const bool known = name == kManifestName || std::find(kLoose.begin(), kLoose.end(), name) != kLoose.end();
    if (manifest_.files.count(inner) != 0 || (top && (known || name[0] == '.'))) continue;
    throw Error(Kind::BundleError, inner, "a file that the manifest does not list",
                "such files only in engines/, report/, reference/", "something was added to the bundle by hand",
                "move the file elsewhere");
  }
  if (failed) {
    throw Error(Kind::BundleError, folder.empty() ? root_ : folder, "a folder that cannot be read (" + failed.message() + ")",
                "a readable folder", "missing rights, or a damaged disk", "look at the folder's rights");
  }
}

std::string Bundle::path(const std::string& name) const {
  if (manifest_.files.count(name) == 0) refuse_unlisted(root_, name, manifest_);
  return root_ + "/" + name;
}

StepProgram Bundle::program(std::int64_t steps) const {
  const auto found = manifest_.programs.files.find(std::to_string(steps));
  if (found != manifest_.programs.files.end()) return load_program(found->second);
  std::vector<std::int64_t> available;
  for (const auto& entry : manifest_.programs.files) {
    if (count_of(entry.first) >= 0) available.push_back(count_of(entry.first));
  }
  std::sort(available.begin(), available.end());
  std::string near = "none is in the bundle";
  if (!available.empty()) {
    // Within range, so that the difference cannot overflow.
    const std::int64_t asked = std::clamp<std::int64_t>(steps, -1, 2'000'000'000);
    const auto close = *std::min_element(available.begin(), available.end(), [&](std::int64_t a, std::int64_t b) {
      return std::llabs(a - asked) < std::llabs(b - asked);
    });
    near = "the nearest in the bundle is " + std::to_string(close);
  }
  throw Error(Kind::RequestError, "num_inference_steps", std::to_string(steps),
              "a step count with a program (" + ranges(available) + ")",
              "the bundle holds no " + manifest_.programs.scheduler + " program for " + std::to_string(steps) + " steps",
              near + "; or trace one with the Python package's extra 'compile' and pass it as a program");
}

StepProgram Bundle::load_program(const std::string& name) const {
  return read_program(read_file(path(name), name, kLargestText), name);
}

void check_references(const Manifest& manifest) {
  const std::string place = kManifestName;
  for (const auto& entry : manifest.files) {
    const std::string& name = entry.first;
    check_path(name, place + ".files");
    if (sidecar(name.substr(0, name.find('/'))) || name == kManifestName) {
      throw Error(Kind::UnsafePath, place + ".files", repr(name), "no file in engines, report, reference",
                  "sidecar folders change after the bundle is written", "compile the bundle again");
    }
  }
  for (const auto& [where, name] : references(manifest)) {
    check_path(name, place + "." + where);
    if (manifest.files.count(name) == 0) refuse_unlisted(place + "." + where, name, manifest);
  }
  for (const auto& [graph, entry] : manifest.graphs) {
    std::vector<std::string> files = {entry.file};
    files.insert(files.end(), entry.data.begin(), entry.data.end());
    for (const auto& name : files) {
      if (name.rfind("graphs/", 0) == 0) continue;
      throw Error(Kind::UnsafePath, place + ".graphs." + graph, "the path " + repr(name), "a path below graphs/",
                  "engines open files in graphs/ alone", "compile the bundle again");
    }
  }
  const auto& decoder = manifest.decoder.graph;
  if (decoder && manifest.graphs.count(*decoder) == 0) {
    throw Error(Kind::BundleError, place + ".decoder.graph", repr(*decoder), "a key of graphs",
                "the manifest was changed by hand", nearest(*decoder, manifest.graph_names()));
  }
  check_features(manifest);
}

}  // namespace quantempo::runtime
