// Errors of the runtime: the same names and the same five parts as the Python package's.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace quantempo::runtime {

// Values are those of `quantempo_status` in the C header.
enum class Kind : int {
  Ok = 0,
  DataError = 1,
  UnknownKey = 2,
  BundleError = 3,
  DigestMismatch = 4,
  UnsafePath = 5,
  NewerBundle = 6,
  UnknownFeature = 7,
  RequestError = 8,
  EngineError = 9,
  Cancelled = 10,
  CallbackFailed = 11,
  InvalidArgument = 12,
  OutOfMemory = 13,
  Internal = 14,
};

const char* kind_name(Kind kind);

// One refusal: where, what was found, what was wanted, the likely cause, the next step.
class Error : public std::runtime_error {
 public:
  Error(Kind kind, std::string where, std::string found, std::string wanted, std::string cause, std::string remedy);

  Kind kind;
  std::string where, found, wanted, cause, remedy;
};

// A string as Python's `repr` shows it, so that both runtimes say the same words.
std::string repr(const std::string& text);

// The known word closest to a misspelt one, as a phrase for `remedy`, or the list of all known words.
std::string nearest(const std::string& word, std::vector<std::string> known);

std::string join(const std::vector<std::string>& words, const std::string& separator = ", ");

// A number as Python's `%g` shows it.
std::string general(double value);

}  // namespace quantempo::runtime
