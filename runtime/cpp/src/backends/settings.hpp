// Engine settings: a closed set of keys, each with legal words.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace quantempo::runtime {

struct Setting {
  std::vector<std::string> legal;  // the first one is the default
  bool number = false;             // also takes any number of at least 1
};

// The given values over the defaults.  Throws `EngineError` for an unknown key or word.
std::map<std::string, std::string> checked_settings(const std::string& where,
                                                    const std::map<std::string, std::string>& given,
                                                    const std::map<std::string, Setting>& known);

}  // namespace quantempo::runtime
