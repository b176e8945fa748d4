/* Says that it is the OpenVINO that OPENVINO_BUILD names, and has nothing else. */
#include <stdlib.h>

struct version {
  const char *build, *description;
};

__attribute__((visibility("default"))) int ov_get_openvino_version(struct version* found) {
  found->build = getenv("OPENVINO_BUILD");
  found->description = "OpenVINO Runtime";
  return 0;
}

__attribute__((visibility("default"))) void ov_version_free(struct version* found) {
  found->build = found->description = NULL;
}
