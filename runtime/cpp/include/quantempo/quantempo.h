/* quantempo: samples images from a bundle.  The C interface.
 *
 * Rules, the same everywhere:
 * - Every function that can fail returns a status; `quantempo_last_error` has the words, per thread.
 * - Options are structs that begin with their own size.  Fill them with `quantempo_*_options_defaults` first: a program
 *   that was built against an older header then runs with a newer library, whose new fields keep their defaults.
 * - What the library hands out it frees: `quantempo_close`, `quantempo_result_free`.  Pointers into a handle live as
 *   long as the handle.  What you pass in is copied or only read during the call.
 * - No exception leaves the library, and a callback must not throw one through it (the C++ wrapper takes care).
 * - A session may be used from any thread; calls on one session wait for each other, `quantempo_cancel` does not.
 *   A result belongs to one thread at a time.
 * See docs/cpp.md.
 */
#ifndef QUANTEMPO_H
#define QUANTEMPO_H

#include <stddef.h>
#include <stdint.h>

#ifndef QUANTEMPO_API
#if defined(_WIN32)
#define QUANTEMPO_API __declspec(dllimport)
#else
#define QUANTEMPO_API __attribute__((visibility("default")))
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when something is added; what is there keeps its meaning. */
#define QUANTEMPO_ABI_VERSION 1

/* The names are those of the Python package's errors (`quantempo_status_name`). */
typedef enum quantempo_status {
  QUANTEMPO_OK = 0,
  QUANTEMPO_DATA_ERROR = 1,       /* a JSON document or program does not have the shape that it should */
  QUANTEMPO_UNKNOWN_KEY = 2,      /* ... holds a key that its type does not have */
  QUANTEMPO_BUNDLE_ERROR = 3,     /* not a bundle, a file missing or too many, parts that do not fit */
  QUANTEMPO_DIGEST_MISMATCH = 4,  /* a file's size or bytes are not those that were written */
  QUANTEMPO_UNSAFE_PATH = 5,      /* a path leaves the bundle, or is a link */
  QUANTEMPO_NEWER_BUNDLE = 6,     /* written by a newer quantempo */
  QUANTEMPO_UNKNOWN_FEATURE = 7,  /* requires a feature that this library does not have */
  QUANTEMPO_REQUEST_ERROR = 8,    /* an argument is outside what the bundle takes */
  QUANTEMPO_ENGINE_ERROR = 9,     /* an engine could not be opened or run */
  QUANTEMPO_CANCELLED = 10,       /* `quantempo_cancel`, or a callback returned 1 */
  QUANTEMPO_CALLBACK_FAILED = 11, /* a callback returned something else than 0 and 1 */
  QUANTEMPO_INVALID_ARGUMENT = 12, /* a null pointer, a short buffer, a struct without its size */
  QUANTEMPO_OUT_OF_MEMORY = 13,
  QUANTEMPO_INTERNAL = 14 /* a fault of ours: please report it */
} quantempo_status;

typedef struct quantempo_session quantempo_session;
typedef struct quantempo_result quantempo_result;

QUANTEMPO_API uint32_t quantempo_abi_version(void);
QUANTEMPO_API const char* quantempo_status_name(quantempo_status status);
/* The backends that this library was built with, separated by commas. */
QUANTEMPO_API const char* quantempo_backends(void);

/* The last error of this thread: where, what was found, what was wanted, the likely cause, the next step.
 * Empty after a call that went well; valid until this thread's next call. */
QUANTEMPO_API const char* quantempo_last_error(void);

/* ---- opening ------------------------------------------------------------------------------------------------- */

/* Something to know that is no error, such as a run outside the calibrated range; `name` is short and fixed. */
typedef void (*quantempo_notice)(void* user, const char* name, const char* text);

typedef struct quantempo_open_options {
  size_t size;
  const char* backend;       /* "ort" (default), "openvino", "tensorrt" */
  const char* library;       /* the engine's shared library; NULL: its environment variable, then the usual places */
  int32_t threads;           /* of the engine within one call; 0 lets it choose */
  const char* dialect;       /* which denoiser graphs; NULL takes those that suit the backend */
  const char* feature_cache; /* "auto" (default), "none", "plan": see quantempo_sample_options */
  const char* const* settings; /* engine settings, "key=value" each */
  size_t settings_count;
  quantempo_notice notice; /* NULL: not told.  Called on the thread that opens or samples */
  void* notice_user;
} quantempo_open_options;

QUANTEMPO_API void quantempo_open_options_defaults(quantempo_open_options* options);

/* Verifies a bundle and opens its denoiser graphs.  `options` may be NULL. */
QUANTEMPO_API quantempo_status quantempo_open(const char* path, const quantempo_open_options* options,
                                              quantempo_session** session);
/* NULL is allowed.  No call on the session may be under way. */
QUANTEMPO_API void quantempo_close(quantempo_session* session);

/* ---- looking ------------------------------------------------------------------------------------------------- */

#define QUANTEMPO_MAX_RANK 8

typedef struct quantempo_info {
  size_t size;
  const char* name;      /* of the model */
  const char* precision; /* "int8", "fp8", "float32" */
  const char* scheduler;
  const char* digest; /* SHA-256 of the manifest, which names the bundle */
  int64_t latents_shape[QUANTEMPO_MAX_RANK]; /* of one sample */
  size_t latents_rank;
  size_t latents_count;     /* elements of one sample */
  int64_t classes;          /* labels are 0 .. classes - 1; 0 where the model has none */
  int64_t default_steps;
  double default_guidance;
  int64_t max_batch; /* 0 for no limit */
  int32_t has_decoder;
} quantempo_info;

/* `info->size` must be set (or take `quantempo_info_defaults`). */
QUANTEMPO_API void quantempo_info_defaults(quantempo_info* info);
QUANTEMPO_API quantempo_status quantempo_get_info(const quantempo_session* session, quantempo_info* info);

/* ---- sampling ------------------------------------------------------------------------------------------------ */

/* 8-bit pixels, row by row, channels interleaved (1: grey, 3: RGB). */
typedef struct quantempo_image {
  const uint8_t* pixels;
  size_t width, height, channels;
} quantempo_image;

/* After each step.  The latents may be changed in place.  Return 0 to go on, 1 to cancel, anything else to fail. */
typedef struct quantempo_step {
  size_t size;
  int64_t index; /* of the step, from 0 */
  int64_t steps; /* how many there are */
  double timestep;
  float* latents; /* (batch, ...) */
  size_t latents_count;
} quantempo_step;
typedef int32_t (*quantempo_on_step)(void* user, const quantempo_step* step);

/* What the image looks like so far: the latents of the first sample after a step, decoded. */
typedef int32_t (*quantempo_on_preview)(void* user, int64_t index, const quantempo_image* image);

/* A conditioning input that the caller supplies, `NAME` or `negative_NAME`, with the batch first. */
typedef struct quantempo_array {
  const char* name;
  const char* dtype; /* numpy's word: "float32", "int64", ... */
  const int64_t* shape;
  size_t rank;
  const void* data;
  size_t bytes;
} quantempo_array;

typedef struct quantempo_sample_options {
  size_t size;
  int64_t batch; /* 0: told by the arrays below, else 1 */
  const int64_t* labels; /* one, or one per sample */
  size_t labels_count;
  int64_t steps;    /* 0: the bundle's default, or the program's */
  int32_t has_seed; /* 0: one is drawn, and told by quantempo_get_timings */
  uint64_t seed;    /* sample i of one seed is the same whatever the batch */
  const uint64_t* seeds; /* instead: one per sample */
  size_t seeds_count;
  const double* guidance; /* one, or one per sample; NULL: the bundle's default */
  size_t guidance_count;
  double guidance_rescale;
  const char* guidance_mode; /* "batched", "split", NULL: batched where the graph takes so many rows */
  const char* feature_cache; /* "auto", "none", "plan" (refuse to run without), NULL: as opened */
  const char* program; /* another step program: its JSON text */
  const float* latents; /* standard normals to start from, (batch, ...) or one sample's */
  size_t latents_count;
  const quantempo_array* arrays;
  size_t arrays_count;
  int32_t decode; /* default 1; 0 leaves the result without images */
  quantempo_on_step on_step;
  quantempo_on_preview on_preview;
  int64_t preview_every; /* steps; default 1 */
  void* user; /* for both callbacks */
} quantempo_sample_options;

QUANTEMPO_API void quantempo_sample_options_defaults(quantempo_sample_options* options);
QUANTEMPO_API quantempo_status quantempo_sample(quantempo_session* session, const quantempo_sample_options* options,
                                                quantempo_result** result);
/* Ends the call that runs on the session, if one does, before its next evaluation of the model.  From any thread. */
QUANTEMPO_API quantempo_status quantempo_cancel(quantempo_session* session);

/* ---- results ------------------------------------------------------------------------------------------------- */

typedef struct quantempo_timings {
  size_t size;
  double total, plan, loop, engine, decode; /* seconds */
  int64_t engine_calls, rows, reused;       /* rows: evaluations of the model; reused: with cached features */
  uint64_t seed;                            /* the seed of the call, the first of several */
} quantempo_timings;

QUANTEMPO_API size_t quantempo_result_count(const quantempo_result* result); /* images, or samples */
QUANTEMPO_API quantempo_status quantempo_result_image(const quantempo_result* result, size_t index,
                                                      quantempo_image* image);
/* Final latents, (batch, ...): copied to a buffer of at least as many floats. */
QUANTEMPO_API size_t quantempo_result_latents_count(const quantempo_result* result);
QUANTEMPO_API quantempo_status quantempo_result_latents(const quantempo_result* result, float* buffer, size_t count);
QUANTEMPO_API void quantempo_timings_defaults(quantempo_timings* timings);
QUANTEMPO_API quantempo_status quantempo_get_timings(const quantempo_result* result, quantempo_timings* timings);
/* All images as one grid (`columns` 0: about as many as rows), as PNG. */
QUANTEMPO_API quantempo_status quantempo_result_write_png(const quantempo_result* result, const char* path,
                                                          size_t columns);
/* NULL is allowed. */
QUANTEMPO_API void quantempo_result_free(quantempo_result* result);

#ifdef __cplusplus
}
#endif

#endif
