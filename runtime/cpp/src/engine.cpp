#include "engine.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "error.hpp"

namespace quantempo::runtime {

namespace {

constexpr std::size_t kAlignment = 64;

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

}  // namespace

Buffer::Buffer(TensorSpec spec_, Shape shape_, const std::string& where) : spec(std::move(spec_)), shape(std::move(shape_)) {
  const std::size_t size = element_size(spec.dtype);
  if (size == 0) {
    throw Error(Kind::EngineError, where + ": tensor " + repr(spec.name), "type " + spec.dtype,
                "a type with whole bytes per element", "the runtime has no such type", "cast to float32 inside the graph");
  }
  bytes = element_count(shape) * size;
  // `aligned_alloc` wants a multiple of the alignment, and an address even for nothing.
  const std::size_t rounded = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  data = std::aligned_alloc(kAlignment, rounded);
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, rounded);
}

Buffer::~Buffer() { std::free(data); }

const TensorSpec* Engine::input(const std::string& tensor) const { return find(inputs, tensor); }
const TensorSpec* Engine::output(const std::string& tensor) const { return find(outputs, tensor); }

Shape resolve(const TensorSpec& spec, const Sizes& sizes, bool& known) {
  Shape shape;
  known = true;
  for (const auto& dimension : spec.shape) {
    if (const auto* size = std::get_if<std::int64_t>(&dimension)) {
      shape.push_back(*size);
    } else {
      const auto found = sizes.find(std::get<std::string>(dimension));
      known = known && found != sizes.end();
      shape.push_back(found != sizes.end() ? found->second : 0);
    }
  }
  return shape;
}

Buffers allocate(const std::string& where, const std::vector<TensorSpec>& specs, const Sizes& sizes,
                 const Buffers& share, const MakeBuffer& make) {
  Buffers buffers;
  for (const auto& spec : specs) {
    bool known = false;
    const Shape shape = resolve(spec, sizes, known);
    if (!known) continue;
    const auto other = share.find(spec.name);
    if (other == share.end()) {
      buffers[spec.name] = make(spec, shape);
      continue;
    }
    const auto& held = *other->second;
    if (held.shape != shape || held.spec.dtype != spec.dtype) {
      throw Error(Kind::EngineError, where + ": shared buffer " + repr(spec.name),
                  held.spec.dtype + " " + shown(held.shape), spec.dtype + " " + shown(shape),
                  "the two graphs do not fit each other", "bind both with the same sizes");
    }
    buffers[spec.name] = other->second;
  }
  return buffers;
}

Buffers allocate_inputs(const std::string& where, const std::vector<TensorSpec>& specs, const Sizes& sizes,
                        const Buffers& share, const MakeBuffer& make) {
  Buffers buffers = allocate(where, specs, sizes, share, make);
  for (const auto& spec : specs) {
    if (buffers.count(spec.name) != 0) continue;
    throw Error(Kind::EngineError, where + ": bind", "no size for " + shown(spec.shape), "a size for each symbol",
                "the graph's shape is symbolic there", "compile the bundle again");
  }
  return buffers;
}

BufferPtr host_buffer(const std::string& where, const TensorSpec& spec, const Shape& shape) {
  return std::make_shared<Buffer>(spec, shape, where);
}

}  // namespace quantempo::runtime
