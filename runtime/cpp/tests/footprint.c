/* The same as bare.c through this library: opens a bundle, samples latents, prints its memory and times.
 *
 *     footprint BUNDLE LIBRARY LABEL STEPS RUNS [CACHE]
 *
 * One sample with the bundle's guidance, one thread, without a decoder, and without feature caching unless CACHE
 * says how.
 */
#include <stdlib.h>
#include <time.h>

#include "footprint.h"
#include "quantempo/quantempo.h"

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void check(quantempo_status status) {
  if (status == QUANTEMPO_OK) return;
  fprintf(stderr, "%s: %s\n", quantempo_status_name(status), quantempo_last_error());
  exit(1);
}

int main(int count, char** words) {
  quantempo_open_options open;
  quantempo_sample_options options;
  quantempo_session* session = NULL;
  const double started = now();
  int64_t label;
  int run, runs;
  if (count != 6 && count != 7) return 2;
  quantempo_open_options_defaults(&open);
  open.library = words[2];
  open.threads = 1;
  open.feature_cache = count == 7 ? words[6] : "none";
  check(quantempo_open(words[1], &open, &session));
  printf("open %.6f\n", now() - started);
  label = atoll(words[3]);
  runs = atoi(words[5]);
  quantempo_sample_options_defaults(&options);
  options.labels = &label;
  options.labels_count = 1;
  options.has_seed = 1;
  options.steps = atoll(words[4]);
  options.decode = 0;
  for (run = 0; run < runs; ++run) {
    quantempo_result* result = NULL;
    quantempo_timings timings;
    check(quantempo_sample(session, &options, &result));
    if (run == 0) printf("first %.6f\n", now() - started);
    quantempo_timings_defaults(&timings);
    check(quantempo_get_timings(result, &timings));
    printf("call %.9f\n", (timings.loop - timings.engine) / (double)timings.engine_calls);
    quantempo_result_free(result);
  }
  print_footprint();
  quantempo_close(session);
  return 0;
}
