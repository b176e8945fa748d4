// What the loop asks of an inference engine.  A backend is one file and one line in backends.cpp.
//
// `bind` fixes the shapes and allocates every input and output once; after that a call is `Binding::run` with no
// allocation and no copy that the caller did not ask for.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tensors.hpp"

namespace quantempo::runtime {

// Something that a user should know and that is no error: its name as the Python package has it, and a sentence.
using Notice = std::function<void(const std::string& name, const std::string& text)>;

// Memory of one bound tensor at a fixed address for the life of its bindings.
class Buffer {
 public:
  Buffer(TensorSpec spec_, Shape shape_, const std::string& where);
  virtual ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Makes what was written to `data` visible to the engine, and the reverse; nothing to do for host memory.
  virtual void push() {}
  virtual void pull() {}

  template <typename T>
  T* as() { return static_cast<T*>(data); }
  // Bytes of one row, where the first dimension counts rows.
  std::size_t row_bytes() const { return shape.empty() || shape[0] == 0 ? bytes : bytes / static_cast<std::size_t>(shape[0]); }

  TensorSpec spec;
  Shape shape;
  std::size_t bytes = 0;
  void* data = nullptr;  // host memory on a cache line, zeros at first
};

using BufferPtr = std::shared_ptr<Buffer>;
using Buffers = std::map<std::string, BufferPtr>;
using Sizes = std::map<std::string, std::int64_t>;

// A graph with all shapes fixed and all buffers allocated.
class Binding {
 public:
  virtual ~Binding() = default;
  virtual void run() = 0;

  Buffers inputs, outputs;
};

// One opened graph.
class Engine {
 public:
  virtual ~Engine() = default;
  // `share` holds buffers of another binding to use as inputs or outputs of that name (cached features).
  virtual std::unique_ptr<Binding> bind(const Sizes& sizes, const Buffers& share) = 0;

  const TensorSpec* input(const std::string& tensor) const;
  const TensorSpec* output(const std::string& tensor) const;

  std::string name;
  std::vector<TensorSpec> inputs, outputs;
};

struct EngineOptions {
  std::string library;  // path or name of the engine's shared library; empty: the usual places
  int threads = 0;      // 0 lets the engine choose
  std::map<std::string, std::string> settings;
  Notice notice;

  // Passes a notice on, where anybody listens.
  void tell(const std::string& name, const std::string& text) const {
    if (notice) notice(name, text);
  }
};

// An engine library, opened once per session; graphs that it opens may share what they have in common.
class Backend {
 public:
  virtual ~Backend() = default;
  // The denoiser graphs that suit it, best first.
  virtual std::vector<std::string> dialects() const = 0;
  virtual std::unique_ptr<Engine> open(const std::string& path, const std::string& dialect) = 0;
};

// Opens a backend by name.  Throws `EngineError` for an unknown one, a library that is not there, or an older one.
std::unique_ptr<Backend> open_backend(const std::string& name, const EngineOptions& options);

// The names of the backends that this build has.
std::vector<std::string> backend_names();

// The concrete shape for given sizes; a symbol without a size makes it empty with `known` false.
Shape resolve(const TensorSpec& spec, const Sizes& sizes, bool& known);

using MakeBuffer = std::function<BufferPtr(const TensorSpec& spec, const Shape& shape)>;

// A buffer per tensor; a shared one takes over the other binding's memory.  Skips tensors of unknown shape.
Buffers allocate(const std::string& where, const std::vector<TensorSpec>& specs, const Sizes& sizes,
                 const Buffers& share, const MakeBuffer& make);

// The same for inputs, of which none may be skipped.  Throws `EngineError`.
Buffers allocate_inputs(const std::string& where, const std::vector<TensorSpec>& specs, const Sizes& sizes,
                        const Buffers& share, const MakeBuffer& make);

// A plain host buffer.
BufferPtr host_buffer(const std::string& where, const TensorSpec& spec, const Shape& shape);

}  // namespace quantempo::runtime
