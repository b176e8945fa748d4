#include "settings.hpp"

#include <algorithm>

#include "../error.hpp"

namespace quantempo::runtime {

namespace {

bool is_number(const std::string& text) {
  return !text.empty() && text.size() <= 9 && text[0] != '0' && text.find_first_not_of("0123456789") == std::string::npos;
}

}  // namespace

std::map<std::string, std::string> checked_settings(const std::string& where,
                                                    const std::map<std::string, std::string>& given,
                                                    const std::map<std::string, Setting>& known) {
  std::map<std::string, std::string> settings;
  std::vector<std::string> names;
  for (const auto& [key, setting] : known) settings[key] = setting.legal.front(), names.push_back(key);
  for (const auto& [key, value] : given) {
    const auto found = known.find(key);
    const auto& words = found == known.end() ? names : found->second.legal;
    const bool legal = found != known.end() && (std::find(words.begin(), words.end(), value) != words.end() ||
                                                (found->second.number && is_number(value)));
    if (!legal) {
      throw Error(Kind::EngineError, where + ": settings", key + "=" + value, "one of " + join(words),
                  "a setting of another engine, or a misspelling", nearest(found == known.end() ? key : value, words));
    }
    settings[key] = value;
  }
  return settings;
}

}  // namespace quantempo::runtime
