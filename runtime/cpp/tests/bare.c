/* The yardstick for memory: opens a graph with ONNX Runtime's C API alone and runs it, nothing else.
 *
 *     bare GRAPH LIBRARY LATENTS_C LATENTS_H LATENTS_W ROWS RUNS
 *
 * Feeds zeros to `sample`, `timestep`, `class_labels` and, where the graph has a fourth input, `scale_group`, with one
 * thread, and prints its memory.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "footprint.h"

typedef const void* const* Table;
struct base {
  Table (*get_api)(uint32_t);
  const char* (*version)(void);
};

static Table table;
static void check(void* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ((const char* (*)(const void*))table[2])(status));
  exit(1);
}
#define SLOT(position, ...) check(((void* (*)(__VA_ARGS__))table[position])

int main(int count, char** words) {
  void *env, *options, *session, *memory, *values[4], *output;
  const char* names[] = {"sample", "timestep", "class_labels", "scale_group"};
  const char* wanted[] = {"prediction"};
  size_t inputs = 0;
  int64_t shape[4], rows;
  int runs, i;
  if (count != 8) return 2;
  void* library = dlopen(words[2], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return fprintf(stderr, "%s\n", dlerror()), 1;
  struct base* (*get)(void) = (struct base * (*)(void)) dlsym(library, "OrtGetApiBase");
  table = get()->get_api(16);
  rows = atoll(words[6]);
  runs = atoi(words[7]);
  shape[0] = rows;
  for (i = 0; i < 3; ++i) shape[i + 1] = atoll(words[3 + i]);
  const size_t elements = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]);
  float* sample = calloc(elements, sizeof *sample);
  float* timestep = calloc((size_t)rows, sizeof *timestep);
  int64_t* labels = calloc((size_t)rows, sizeof *labels);
  int64_t group = 0;
  SLOT(3, int, const char*, void**)(3, "bare", &env));
  SLOT(10, void**)(&options));
  SLOT(23, void*, int)(options, 99));
  SLOT(24, void*, int)(options, 1));
  SLOT(25, void*, int)(options, 1));
  SLOT(7, void*, const char*, void*, void**)(env, words[1], options, &session));
  SLOT(30, void*, size_t*)(session, &inputs));
  SLOT(69, int, int, void**)(1, 0, &memory));
  SLOT(49, void*, void*, size_t, int64_t*, size_t, int, void**)(memory, sample, elements * 4, shape, 4, 1, &values[0]));
  SLOT(49, void*, void*, size_t, int64_t*, size_t, int, void**)(memory, timestep, (size_t)rows * 4, shape, 1, 1, &values[1]));
  SLOT(49, void*, void*, size_t, int64_t*, size_t, int, void**)(memory, labels, (size_t)rows * 8, shape, 1, 7, &values[2]));
  SLOT(49, void*, void*, size_t, int64_t*, size_t, int, void**)(memory, &group, 8, shape, 0, 7, &values[3]));
  for (i = 0; i < runs; ++i) {
    output = NULL;
    SLOT(9, void*, void*, const char**, void**, size_t, const char**, size_t, void**)(session, NULL, names, values, inputs, wanted, 1, &output));
    ((void (*)(void*))table[96])(output);
  }
  print_footprint();
  return 0;
}
