#include "error.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace quantempo::runtime {

const char* kind_name(Kind kind) {
  static constexpr std::array<const char*, 15> names = {
      "Ok",           "DataError",      "UnknownKey",   "BundleError", "DigestMismatch",
      "UnsafePath",   "NewerBundle",    "UnknownFeature", "RequestError", "EngineError",
      "Cancelled",    "CallbackFailed", "InvalidArgument", "OutOfMemory", "Internal"};
  const auto index = static_cast<std::size_t>(kind);
  return index < names.size() ? names[index] : "Unknown";
}

namespace {

std::string message(const std::string& where, const std::string& found, const std::string& wanted,
                    const std::string& cause, const std::string& remedy) {
  return where + ": found " + found + ", wanted " + wanted + ".\n  Likely cause: " + cause + ".\n  Next step: " +
         remedy + ".";
}

// Length of the matching blocks of Ratcliff and Obershelp, as Python's difflib counts them.
std::size_t matches(const std::string& a, std::size_t a0, std::size_t a1, const std::string& b, std::size_t b0,
                    std::size_t b1) {
  std::size_t best = 0, best_a = a0, best_b = b0;
  std::vector<std::size_t> lengths(b1 + 1, 0);
  for (std::size_t i = a0; i < a1; ++i) {
    std::vector<std::size_t> next(b1 + 1, 0);
    for (std::size_t j = b0; j < b1; ++j) {
      if (a[i] != b[j]) continue;
      const std::size_t length = next[j + 1] = (j > b0 ? lengths[j] : 0) + 1;
      if (length > best) best = length, best_a = i + 1 - length, best_b = j + 1 - length;
    }
    lengths.swap(next);
  }
  if (best == 0) return 0;
  return best + matches(a, a0, best_a, b, b0, best_b) + matches(a, best_a + best, a1, b, best_b + best, b1);
}

double similarity(const std::string& a, const std::string& b) {
  if (a.empty() && b.empty()) return 1.0;
  return 2.0 * static_cast<double>(matches(a, 0, a.size(), b, 0, b.size())) / static_cast<double>(a.size() + b.size());
}

// A file may hold any number of words of any length; a hint is not worth more than this.
constexpr std::size_t kLongestWord = 100, kMostWords = 500;

}  // namespace

Error::Error(Kind kind_, std::string where_, std::string found_, std::string wanted_, std::string cause_,
             std::string remedy_)
    : std::runtime_error(message(where_, found_, wanted_, cause_, remedy_)), kind(kind_), where(std::move(where_)),
      found(std::move(found_)), wanted(std::move(wanted_)), cause(std::move(cause_)), remedy(std::move(remedy_)) {}

std::string repr(const std::string& text) {
  const bool single = text.find('\'') == std::string::npos || text.find('"') != std::string::npos;
  const char quote = single ? '\'' : '"';
  std::string out(1, quote);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      std::array<char, 8> code{};
      std::snprintf(code.data(), code.size(), "\\x%02x", byte);
      out += code.data();
    } else {
      out += c;
    }
  }
  return out + quote;
}

std::string nearest(const std::string& word, std::vector<std::string> known) {
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  const bool comparable = word.size() <= kLongestWord && known.size() <= kMostWords;
  double best = 0.6;  // difflib's own cutoff
  const std::string* close = nullptr;
  for (const auto& candidate : known) {
    if (!comparable || candidate.size() > kLongestWord) continue;
    const double ratio = similarity(candidate, word);
    // Of equal ones difflib takes the last in order.
    if (ratio >= best) best = ratio, close = &candidate;
  }
  if (close != nullptr) return "did you mean " + repr(*close) + "?";
  if (known.size() > kMostWords) known.resize(kMostWords);
  return "known: " + (known.empty() ? "none" : join(known));
}

std::string join(const std::vector<std::string>& words, const std::string& separator) {
  std::string out;
  for (const auto& word : words) {
    if (&word != &words.front()) out += separator;
    out += word;
  }
  return out;
}

std::string general(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}

}  // namespace quantempo::runtime
