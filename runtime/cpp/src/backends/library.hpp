// Shared libraries opened at run time.
#pragma once

#include <string>
#include <vector>

namespace quantempo::runtime {

// Opens a library that stays loaded until the process ends: engines keep threads that outlive their handles.
// Tries `named` alone where it is not empty, else what the environment variable QUANTEMPO_BACKEND_LIBRARY names, else the
// usual names.  Throws `EngineError` with the linker's words.
void* open_library(const std::string& backend, const std::string& named, const std::vector<std::string>& usual);

// A symbol of a library, or null.
void* find_symbol(void* library, const char* name);

// A symbol of a library.  Throws `EngineError` where an older library lacks it.
void* library_symbol(void* library, const std::string& backend, const char* name);

}  // namespace quantempo::runtime
