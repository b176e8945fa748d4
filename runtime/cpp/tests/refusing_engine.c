/* ONNX Runtime, but for one thing: it refuses to share packed weights between sessions, as it does on processors where
   a kernel packs in a way of its own.  The real library is named by REAL_ORT_LIBRARY. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kCreateStatus = 0, kCreateSessionWithPrepackedWeightsContainer = 168, kFunctions = 200 };

struct base {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)(void);
};

static const struct base* real;
static const void* functions[kFunctions];

static void* refuse(const void* env, const char* path, const void* options, void* container, void** session) {
  typedef void* (*create_status)(int code, const char* words);
  (void)env, (void)options, (void)container, (void)session;
  fprintf(stderr, "refused to share: %s\n", strrchr(path, '/') + 1);
  return ((create_status)functions[kCreateStatus])(
      1, "The kernel doesn't have an implementation that can cache computed pre-packed weights");
}

static const void* const* get_api(uint32_t version) {
  const void* const* found = real->get_api(version);
  if (found == NULL) return NULL;
  memcpy(functions, found, sizeof(functions));
  functions[kCreateSessionWithPrepackedWeightsContainer] = (const void*)refuse;
  return functions;
}
static const char* get_version(void) { return real->version(); }

__attribute__((visibility("default"))) const struct base* OrtGetApiBase(void) {
  static const struct base base = {get_api, get_version};
  typedef const struct base* (*get_base)(void);
  void* library = dlopen(getenv("REAL_ORT_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  real = ((get_base)dlsym(library, "OrtGetApiBase"))();
  return &base;
}
