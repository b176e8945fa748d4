/* Says that it is ONNX Runtime 1.4 and has no newer interface. */
#include <stddef.h>
#include <stdint.h>

struct base {
  const void* (*get_api)(uint32_t version);
  const char* (*version)(void);
};

static const void* get_api(uint32_t version) {
  (void)version;
  return NULL;
}
static const char* get_version(void) { return "1.4.0"; }

__attribute__((visibility("default"))) const struct base* OrtGetApiBase(void) {
  static const struct base base = {get_api, get_version};
  return &base;
}
