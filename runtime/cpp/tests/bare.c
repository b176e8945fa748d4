/* The yardstick for memory: opens graphs with ONNX Runtime's C API alone and runs them in turns, nothing else.
 *
 *     bare LIBRARY ROWS RUNS GRAPH...
 *
 * Feeds zeros, with ROWS for every size that a graph leaves open and one thread, and prints its memory.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "footprint.h"

enum { kTensors = 32, kRank = 8, kFloat = 1, kInt64 = 7 };
typedef const void* const* Table;
struct base {
  Table (*get_api)(uint32_t);
  const char* (*version)(void);
};
struct graph {
  void* session;
  size_t inputs, outputs;
  char *input_names[kTensors], *output_names[kTensors];
  void* values[kTensors];
};

static Table table;
static void check(void* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ((const char* (*)(const void*))table[2])(status));
  exit(1);
}
#define SLOT(position, ...) check(((void* (*)(__VA_ARGS__))table[position])
#define RELEASE(position, object) ((void (*)(void*))table[position])(object)

/* Zeros of an input's type and shape. */
static void* zeros(void* session, void* memory, size_t index, int64_t rows) {
  void *info, *value;
  const void* tensor;
  int64_t shape[kRank];
  size_t rank, i, elements = 1;
  int type;
  SLOT(33, void*, size_t, void**)(session, index, &info));
  SLOT(55, void*, const void**)(info, &tensor));
  SLOT(60, const void*, int*)(tensor, &type));
  SLOT(61, const void*, size_t*)(tensor, &rank));
  if (rank > kRank || (type != kFloat && type != kInt64)) {
    fprintf(stderr, "input %zu: type %d of rank %zu\n", index, type, rank);
    exit(1);
  }
  SLOT(62, const void*, int64_t*, size_t)(tensor, shape, rank));
  RELEASE(98, info);
  for (i = 0; i < rank; ++i) {
    if (shape[i] < 0) shape[i] = rows;
    elements *= (size_t)shape[i];
  }
  const size_t bytes = elements * (type == kFloat ? sizeof(float) : sizeof(int64_t));
  SLOT(49, void*, void*, size_t, int64_t*, size_t, int, void**)(memory, calloc(bytes, 1), bytes, shape, rank, type, &value));
  return value;
}

int main(int count, char** words) {
  void *env, *options, *memory, *allocator, *results[kTensors];
  struct graph* graphs;
  int64_t rows;
  int runs, run, i;
  size_t k;
  if (count < 5) return 2;
  void* library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return fprintf(stderr, "%s\n", dlerror()), 1;
  struct base* (*get)(void) = (struct base * (*)(void)) dlsym(library, "OrtGetApiBase");
  table = get()->get_api(18);
  rows = atoll(words[2]);
  runs = atoi(words[3]);
  count -= 4;
  graphs = calloc((size_t)count, sizeof *graphs);
  SLOT(3, int, const char*, void**)(3, "bare", &env));
  SLOT(10, void**)(&options));
  SLOT(23, void*, int)(options, 99));
  SLOT(24, void*, int)(options, 1));
  SLOT(25, void*, int)(options, 1));
  SLOT(69, int, int, void**)(1, 0, &memory));
  SLOT(78, void**)(&allocator));
  for (i = 0; i < count; ++i) {
    struct graph* graph = &graphs[i];
    SLOT(7, void*, const char*, void*, void**)(env, words[4 + i], options, &graph->session));
    SLOT(30, void*, size_t*)(graph->session, &graph->inputs));
    SLOT(31, void*, size_t*)(graph->session, &graph->outputs));
    if (graph->inputs > kTensors || graph->outputs > kTensors) return 1;
    for (k = 0; k < graph->inputs; ++k) {
      SLOT(36, void*, size_t, void*, char**)(graph->session, k, allocator, &graph->input_names[k]));
      graph->values[k] = zeros(graph->session, memory, k, rows);
    }
    for (k = 0; k < graph->outputs; ++k) {
      SLOT(37, void*, size_t, void*, char**)(graph->session, k, allocator, &graph->output_names[k]));
    }
  }
  for (run = 0; run < runs; ++run) {
    struct graph* graph = &graphs[run % count];
    for (k = 0; k < graph->outputs; ++k) results[k] = NULL;
    SLOT(9, void*, void*, char**, void**, size_t, char**, size_t, void**)(graph->session, NULL, graph->input_names, graph->values, graph->inputs, graph->output_names, graph->outputs, results));
    for (k = 0; k < graph->outputs; ++k) RELEASE(96, results[k]);
  }
  print_footprint();
  return 0;
}
