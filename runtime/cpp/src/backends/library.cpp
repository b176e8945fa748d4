#include "library.hpp"

#include <dlfcn.h>

#include <cctype>
#include <cstdlib>

#include "../error.hpp"

namespace quantempo::runtime {

void* open_library(const std::string& backend, const std::string& named, const std::vector<std::string>& usual) {
  std::string variable = "QUANTEMPO_", words;
  for (const char letter : backend) variable += static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
  variable += "_LIBRARY";
  const char* set = std::getenv(variable.c_str());
  std::vector<std::string> names = usual;
  if (set != nullptr && *set != '\0') names = {set};
  if (!named.empty()) names = {named};
  for (const auto& name : names) {
    void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library != nullptr) return library;
    const char* error = ::dlerror();
    words += (words.empty() ? "" : "; ") + std::string(error == nullptr ? name : error);
  }
  throw Error(Kind::EngineError, "engine " + repr(backend), "no library that opens (" + words + ")",
              "the library of " + backend, "it is not installed, or lies where the system does not look",
              "install it, or pass its path as the option `library` or in " + variable +
                  " (the Python packages hold the libraries: docs/cpp.md, Backends)");
}

void* find_symbol(void* library, const char* name) { return ::dlsym(library, name); }

void* library_symbol(void* library, const std::string& backend, const char* name) {
  void* symbol = find_symbol(library, name);
  if (symbol != nullptr) return symbol;
  throw Error(Kind::EngineError, "engine " + repr(backend), "a library without " + std::string(name),
              "a library that has it", "the library is older than this runtime, or another one", "update the library");
}

}  // namespace quantempo::runtime
