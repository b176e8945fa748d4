/* The C interface in one page: opens a bundle, samples one image and writes it.
 *
 *     quantempo-minimal BUNDLE OUT.png [LIBRARY]
 */
#include <stdio.h>
#include <stdlib.h>

#include "quantempo/quantempo.h"

static int32_t on_step(void* user, const quantempo_step* step) {
  (void)user;
  printf("step %lld of %lld\n", (long long)step->index + 1, (long long)step->steps);
  return 0;
}

static int fail(quantempo_status status) {
  fprintf(stderr, "%s: %s\n", quantempo_status_name(status), quantempo_last_error());
  return EXIT_FAILURE;
}

int main(int count, char** words) {
  quantempo_open_options open;
  quantempo_sample_options options;
  quantempo_info info;
  quantempo_session* session = NULL;
  quantempo_result* result = NULL;
  quantempo_status status;
  const int64_t label = 0;
  int code = EXIT_FAILURE;

  if (count < 3) {
    fprintf(stderr, "usage: %s BUNDLE OUT.png [LIBRARY]\n", words[0]);
    return 2;
  }
  quantempo_open_options_defaults(&open);
  if (count > 3) open.library = words[3];
  status = quantempo_open(words[1], &open, &session);
  if (status != QUANTEMPO_OK) return fail(status);

  quantempo_info_defaults(&info);
  quantempo_sample_options_defaults(&options);
  status = quantempo_get_info(session, &info);
  if (status == QUANTEMPO_OK) {
    if (info.classes > 0) {
      options.labels = &label;
      options.labels_count = 1;
    }
    options.has_seed = 1;
    options.seed = 0;
    options.steps = 4;
    options.on_step = on_step;
    status = quantempo_sample(session, &options, &result);
  }
  if (status == QUANTEMPO_OK) status = quantempo_result_write_png(result, words[2], 0);
  if (status == QUANTEMPO_OK) {
    printf("wrote %s\n", words[2]);
    code = EXIT_SUCCESS;
  } else {
    fail(status);
  }
  quantempo_result_free(result);
  quantempo_close(session);
  return code;
}
