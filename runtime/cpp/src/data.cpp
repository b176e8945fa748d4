#include "data.hpp"

#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

namespace quantempo::runtime {

namespace {

constexpr int kShownDepth = 8;
constexpr std::size_t kShownLength = 60;

// Written here because the library's own writer recurses as deep as a document wants it to.
void show(const Json& data, int depth, std::string& out) {
  if (out.size() > kShownLength) return;
  if ((data.is_array() || data.is_object()) && !data.empty() && depth == kShownDepth) {
    out += "...";
  } else if (data.is_array()) {
    out += "[";
    bool first = true;
    for (const auto& item : data) {
      if (!first) out += ", ";
      first = false;
      show(item, depth + 1, out);
      if (out.size() > kShownLength) return;
    }
    out += "]";
  } else if (data.is_object()) {
    out += "{";
    bool first = true;
    for (const auto& [key, item] : data.items()) {
      if (!first) out += ", ";
      first = false;
      out += Json(key).dump(-1, ' ', true) + ": ";
      show(item, depth + 1, out);
      if (out.size() > kShownLength) return;
    }
    out += "}";
  } else {
    out += data.dump(-1, ' ', true);
  }
}

std::string shown(const Json& data) {
  std::string text;
  show(data, 0, text);
  return text.size() <= kShownLength ? text : text.substr(0, kShownLength - 3) + "...";
}

std::string where_of(const std::string& where, const std::string& key) { return where + "." + key; }

}  // namespace

Json parse_json(const std::string& text, const std::string& where) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    // The library's own words may hold the bytes that it could not read.
    throw Error(Kind::DataError, where, "text that is not JSON (at byte " + std::to_string(error.byte) + ")",
                "a JSON document", "the file is damaged or was cut short", "write the file anew");
  } catch (const Json::exception&) {
    throw Error(Kind::DataError, where, "text that is not JSON (a number out of range)", "a JSON document",
                "the file is damaged or was cut short", "write the file anew");
  }
}

void wrong(const std::string& where, const Json& data, const std::string& wanted, const std::string& hint) {
  throw Error(Kind::DataError, where, shown(data), wanted, "the file was edited by hand or is damaged", hint);
}

bool Node::null() const { return data_->is_null(); }

bool Node::has(const char* key) const { return data_->contains(key); }

std::string Node::text() const {
  if (!data_->is_string()) wrong(where_, *data_, "a value of type str");
  return data_->get<std::string>();
}

std::int64_t Node::integer() const {
  const bool large = data_->is_number_unsigned() &&
                     data_->get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (!data_->is_number_integer() || large) wrong(where_, *data_, "a value of type int");
  return data_->get<std::int64_t>();
}

double Node::number() const {
  if (!data_->is_number()) wrong(where_, *data_, "a value of type float");
  const double value = data_->get<double>();
  if (!std::isfinite(value)) wrong(where_, *data_, "a finite number");
  return value;
}

bool Node::flag() const {
  if (!data_->is_boolean()) wrong(where_, *data_, "a value of type bool");
  return data_->get<bool>();
}

std::string Node::one_of(std::initializer_list<const char*> words) const {
  std::vector<std::string> known;
  for (const char* word : words) {
    if (data_->is_string() && data_->get_ref<const std::string&>() == word) return word;
    known.push_back(repr(word));
  }
  wrong(where_, *data_, "one of " + join(known));
}

const Node& Node::keys(const char* type, std::initializer_list<const char*> known) const {
  if (!data_->is_object()) wrong(where_, *data_, std::string("an object (") + type + ")");
  for (const auto& [key, value] : data_->items()) {
    bool found = false;
    for (const char* word : known) found = found || key == word;
    if (found) continue;
    throw Error(Kind::UnknownKey, where_of(where_, key), "an unknown key " + repr(key),
                std::string("only keys of ") + type, "a misspelling, or a file written by a newer version",
                nearest(key, std::vector<std::string>(known.begin(), known.end())));
  }
  return *this;
}

Node Node::at(const char* type, const char* key) const {
  const auto found = data_->find(key);
  if (found != data_->end()) return Node(*found, where_of(where_, key));
  throw Error(Kind::DataError, where_of(where_, key), "no such key", std::string("a ") + type + " with " + repr(key),
              "the file is incomplete or was edited by hand", "add " + repr(key) + ", or write the file anew");
}

std::optional<Node> Node::given(const char* key) const {
  const auto found = data_->find(key);
  if (found == data_->end()) return std::nullopt;
  return Node(*found, where_of(where_, key));
}

std::optional<Node> Node::maybe(const char* key) const {
  auto found = given(key);
  if (found && found->null()) return std::nullopt;
  return found;
}

std::vector<Node> Node::list() const {
  if (!data_->is_array()) wrong(where_, *data_, "a list");
  std::vector<Node> nodes;
  nodes.reserve(data_->size());
  for (std::size_t i = 0; i < data_->size(); ++i) nodes.emplace_back((*data_)[i], where_ + "[" + std::to_string(i) + "]");
  return nodes;
}

std::vector<std::pair<std::string, Node>> Node::entries() const {
  if (!data_->is_object()) wrong(where_, *data_, "an object");
  std::vector<std::pair<std::string, Node>> found;
  for (const auto& [key, value] : data_->items()) found.emplace_back(key, Node(value, where_of(where_, key)));
  return found;
}

std::vector<std::string> Node::texts() const {
  std::vector<std::string> found;
  for (const auto& node : list()) found.push_back(node.text());
  return found;
}

std::vector<double> Node::numbers() const {
  std::vector<double> found;
  for (const auto& node : list()) found.push_back(node.number());
  return found;
}

std::map<std::string, std::string> Node::text_map() const {
  std::map<std::string, std::string> found;
  for (const auto& [key, node] : entries()) found.emplace(key, node.text());
  return found;
}

}  // namespace quantempo::runtime
