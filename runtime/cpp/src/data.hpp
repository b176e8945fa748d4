// Reads JSON documents into plain structures, closed: an unknown key is an error, a missing one and a wrong type too.
// The rules are those of the Python package's codec; stricter in one point, numbers must be finite.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "error.hpp"

namespace quantempo::runtime {

using Json = nlohmann::json;

// Parsed JSON; a syntax error becomes a DataError that names the place.
Json parse_json(const std::string& text, const std::string& where);

[[noreturn]] void wrong(const std::string& where, const Json& data, const std::string& wanted,
                        const std::string& hint = "correct the value, or write the file anew");

// A value together with its place in the document.
class Node {
 public:
  Node(const Json& data, std::string where) : data_(&data), where_(std::move(where)) {}

  const Json& data() const { return *data_; }
  const std::string& where() const { return where_; }
  bool null() const;

  std::string text() const;
  std::int64_t integer() const;
  double number() const;
  bool flag() const;
  std::string one_of(std::initializer_list<const char*> words) const;

  // Refuses what is no object, or has a key beside these.
  const Node& keys(const char* type, std::initializer_list<const char*> known) const;
  bool has(const char* key) const;
  // The value of a key that must be there (`type` is for the message).
  Node at(const char* type, const char* key) const;
  // The value of a key where it is there; `maybe` takes null for absent.
  std::optional<Node> given(const char* key) const;
  std::optional<Node> maybe(const char* key) const;

  std::vector<Node> list() const;
  // Keys in the order of the document's own (sorted) keys.
  std::vector<std::pair<std::string, Node>> entries() const;

  std::vector<std::string> texts() const;
  std::vector<double> numbers() const;
  std::map<std::string, std::string> text_map() const;

 private:
  const Json* data_;
  std::string where_;
};

}  // namespace quantempo::runtime
