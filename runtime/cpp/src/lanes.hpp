// Lanes: the rows that go through the engines together, and the memory that all graph variants share for them.
//
// Tensors are shared by name.  The variants of a lane read one `sample`, write one `prediction`, and a cached feature
// that one variant writes is the very buffer that another one reads; nothing is copied.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine.hpp"
#include "guidance.hpp"
#include "manifest.hpp"
#include "program.hpp"
#include "variants.hpp"

namespace quantempo::runtime {

// One conditioning input: rows of the conditional branch, and of the other where it has its own.
struct Condition {
  std::string dtype;
  Shape shape;  // with the batch first
  std::vector<unsigned char> conditional;
  std::optional<std::vector<unsigned char>> unconditional;
};

using Conditioning = std::map<std::string, Condition>;

// What a loop knows about its graphs; engines are opened when they are first asked for.
struct Model {
  std::function<Engine&(const std::string& variant)> engine;
  const Denoiser* denoiser = nullptr;
  Variants variants;
  const Vectors* vectors = nullptr;

  // The outputs of a variant that live in the lane's memory.
  std::set<std::string> shared(const std::string& variant) const;
};

class Part;

class Lane {
 public:
  Lane(const Model& graphs, Rows planned) : rows(std::move(planned)), model(graphs) {}

  // Binds a variant to the lane's memory, or checks that it still takes what it will be fed.
  void bind(const std::string& variant, const std::set<std::string>& fed, const Conditioning& conditioning);
  void set_scalars(double timestep, std::optional<std::int64_t> group);
  void set_vectors(const std::map<std::string, std::int64_t>& chosen);
  void condition(const Conditioning& conditioning);
  Buffer& buffer(const std::string& name) const;
  // A binding of a variant for some of the rows, made when it is first needed.
  Part& part(const std::string& variant, std::size_t count);

  Rows rows;
  const Model& model;
  Buffers buffers;
  std::map<std::string, std::unique_ptr<Binding>> bindings;
  std::map<std::string, Sizes> sizes;
  Buffer* prediction = nullptr;

 private:
  std::map<std::string, Shape> shapes(const Engine& engine, const std::string& variant,
                                      const std::set<std::string>& fed, const Conditioning& conditioning) const;
  void check(const Buffer& buffer, const std::string& variant) const;

  std::map<std::pair<std::string, std::size_t>, std::unique_ptr<Part>> parts_;
};

// A binding for some of a lane's rows, with memory of its own that rows are gathered to and scattered from.
class Part {
 public:
  Part(Lane& lane, const std::string& variant, std::size_t count);

  void gather(const std::vector<std::size_t>& chosen);
  void scatter(const std::vector<std::size_t>& chosen);

  std::unique_ptr<Binding> binding;

 private:
  struct Pair {
    Buffer* mine;
    Buffer* lane;
    bool feature;
  };
  std::vector<Pair> given_, whole_, made_;
};

// The lanes of a model; memory is kept from run to run as long as the shapes stay the same.
class Lanes {
 public:
  explicit Lanes(const Model& model) : model_(model) {}

  std::vector<Lane*> plan(const StepProgram& program, const std::vector<Rows>& rows, const Conditioning& conditioning);

 private:
  using Key = std::pair<std::size_t, std::vector<std::pair<std::string, Shape>>>;

  const Model& model_;
  std::map<std::size_t, std::pair<Key, std::unique_ptr<Lane>>> kept_;
};

}  // namespace quantempo::runtime
