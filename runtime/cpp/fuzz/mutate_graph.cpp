// ONNX files as trees of protobuf fields: fields are copied, dropped, swapped and changed, then written with lengths that
// fit.  Field numbers are those of onnx.proto.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "mutate.hpp"

namespace {

enum Message { Leaf, Model, GraphBody, Node, Attribute, Tensor, Entry, Value, Type, TensorType, Shape, Dimension };

struct Child {
  Message of;
  std::uint64_t number;
  Message type;
};
constexpr std::array<Child, 17> kChildren = {{{Model, 7, GraphBody},     {GraphBody, 1, Node},      {GraphBody, 5, Tensor},
                                              {GraphBody, 11, Value},    {GraphBody, 12, Value},    {GraphBody, 13, Value},
                                              {Node, 5, Attribute},      {Attribute, 5, Tensor},    {Attribute, 6, GraphBody},
                                              {Attribute, 10, Tensor},   {Attribute, 11, GraphBody}, {Tensor, 13, Entry},
                                              {Value, 2, Type},          {Type, 1, TensorType},     {TensorType, 2, Shape},
                                              {Shape, 1, Dimension},     {Type, 4, TensorType}}};

constexpr int kDeepest = 40;
constexpr std::size_t kMostFields = 4000, kLargest = 1 << 15;

const std::array<const char*, 22> kWords = {
    "location", "offset", "length", "weights.bin", "0", "64", "18446744073709551615", "999999999999999999", "../x", "/x",
    "a/../b", "", "MatMul", "DequantizeLinear", "Cast", "Identity", "If", "QLinearConv", "sample", "batch", "w", "a\\b"};
const std::array<std::uint64_t, 14> kNumbers = {0,   1,     2,          3,         7,           10,         16,
                                                127, 255, 0x7fffffff, 1ULL << 32, 1ULL << 40, 1ULL << 63, ~0ULL};

struct Field {
  std::uint64_t number = 0;
  unsigned wire = 0;
  std::uint64_t value = 0;      // wire type 0
  std::string bytes;            // wire types 1, 5 and 2 of a leaf
  Message type = Leaf;
  std::vector<Field> children;  // of a message
};

bool take(const std::string& from, std::size_t& at, std::uint64_t& value) {
  value = 0;
  for (unsigned shift = 0; shift < 64 && at < from.size(); shift += 7) {
    const auto byte = static_cast<unsigned char>(from[at++]);
    value |= std::uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

Message type_of(Message parent, std::uint64_t number) {
  for (const Child& child : kChildren) {
    if (child.of == parent && child.number == number) return child.type;
  }
  return Leaf;
}

bool parse(const std::string& from, Message type, int depth, std::size_t& count, std::vector<Field>& fields) {
  for (std::size_t at = 0; at < from.size();) {
    Field field;
    std::uint64_t tag = 0, length = 0;
    if (++count > kMostFields || !take(from, at, tag)) return false;
    field.number = tag >> 3, field.wire = tag & 7;
    if (field.wire == 0) {
      if (!take(from, at, field.value)) return false;
    } else {
      if (field.wire == 2 && !take(from, at, length)) return false;
      if (field.wire == 1 || field.wire == 5) length = field.wire == 1 ? 8 : 4;
      if (field.wire == 3 || field.wire == 4 || field.wire > 5 || length > from.size() - at) return false;
      field.bytes = from.substr(at, length);
      at += length;
      const Message inner = field.wire == 2 && depth < kDeepest ? type_of(type, field.number) : Leaf;
      if (inner != Leaf && parse(field.bytes, inner, depth + 1, count, field.children)) field.type = inner;
    }
    fields.push_back(std::move(field));
  }
  return true;
}

void put(std::uint64_t value, std::string& out) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void write(const std::vector<Field>& fields, std::string& out) {
  for (const Field& field : fields) {
    if (out.size() > kLargest) return;
    put(field.number << 3 | field.wire, out);
    if (field.wire == 0) {
      put(field.value, out);
      continue;
    }
    std::string inner = field.bytes;
    if (field.type != Leaf) inner.clear(), write(field.children, inner);
    if (field.wire == 2) put(inner.size(), out);
    out += inner;
  }
}

// Every list of fields in the tree, and every field.
void collect(std::vector<Field>& fields, std::vector<std::vector<Field>*>& lists, std::vector<Field*>& all) {
  lists.push_back(&fields);
  for (Field& field : fields) {
    all.push_back(&field);
    if (field.type != Leaf) collect(field.children, lists, all);
  }
}

class Editor {
 public:
  explicit Editor(std::mt19937& random) : random_(random) {}

  void change(std::vector<Field>& model) {
    std::vector<std::vector<Field>*> lists;
    std::vector<Field*> all;
    collect(model, lists, all);
    std::vector<Field>& list = *lists[below(lists.size())];
    Field fresh;
    if (!all.empty()) fresh = *all[below(all.size())];  // a copy: the lists move
    switch (below(7)) {
      case 0:
        if (!list.empty()) list.erase(list.begin() + place(list.size()));
        break;
      case 1:
        list.insert(list.begin() + place(list.size() + 1), std::move(fresh));
        break;
      case 2:
        if (list.size() > 1) std::swap(list[below(list.size())], list[below(list.size())]);
        break;
      case 3:  // one of this list once more: lists of lists grow, and so do chains of nodes
        if (!list.empty()) {
          Field again = list[below(list.size())];
          list.push_back(std::move(again));
        }
        break;
      default:
        if (!all.empty()) alter(*all[below(all.size())]);
    }
  }

 private:
  std::size_t below(std::size_t limit) { return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_); }
  std::ptrdiff_t place(std::size_t limit) { return static_cast<std::ptrdiff_t>(below(limit)); }

  void alter(Field& field) {
    if (below(6) == 0) {
      field.number = 1 + below(15);
    } else if (field.wire == 0) {
      field.value = below(2) == 0 ? kNumbers[below(kNumbers.size())] : field.value + below(7) - 3;
    } else if (field.wire == 2 && field.type == Leaf) {
      field.bytes = kWords[below(kWords.size())];
    } else if (field.wire == 2 && below(3) == 0) {
      field.wire = 0, field.type = Leaf, field.value = kNumbers[below(kNumbers.size())];
    }
  }

  std::mt19937& random_;
};

}  // namespace

bool mutate_graph(std::string& document, std::mt19937& random) {
  std::vector<Field> model;
  std::size_t count = 0;
  if (!parse(document, Model, 0, count, model)) return false;
  Editor editor(random);
  for (int i = 0, times = 1 + static_cast<int>(random() % 4); i < times; ++i) editor.change(model);
  document.clear();
  write(model, document);
  return true;
}
