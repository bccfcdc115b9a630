/* moerun's C interface: open a model, compute logits, generate tokens.
 *
 * Every function that can fail returns a moerun_status; moerun_last_error() then says why, for the
 * calling thread, until its next call. Handles are opaque; closing a null handle does nothing. A
 * model may be used from several threads; a generation only from one at a time. Structures start
 * with their own size, so that later versions can add fields: set it by the _default functions.
 */
#ifndef MOERUN_H
#define MOERUN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MOERUN_API __attribute__((visibility("default")))
#else
#define MOERUN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum moerun_status {
  MOERUN_OK = 0,
  MOERUN_END = 1, /* the generation has no further token */
  MOERUN_INVALID_ARGUMENT = -1,
  MOERUN_FILE_ERROR = -2,   /* a file is missing or cannot be read */
  MOERUN_FORMAT_ERROR = -3, /* a file says something wrong */
  MOERUN_UNSUPPORTED_MODEL = -4,
  MOERUN_OUT_OF_MEMORY = -5,
  MOERUN_INTERNAL_ERROR = -6,
  MOERUN_DEVICE_ERROR = -7, /* the device failed: the model is closed, open it again */
  MOERUN_FORK_ERROR = -8    /* the model was at work when this process was forked: open it again */
} moerun_status;

typedef struct moerun_model moerun_model;
typedef struct moerun_generation moerun_generation;

typedef struct moerun_options {
  size_t struct_size;
  const char* device;      /* "auto", "cpu" or "cuda" */
  int32_t threads;         /* 0: one for every usable processor */
  int64_t context_length;  /* tokens; 0: what the model was made for */
  int64_t prefill_chunk;   /* tokens that go through the layers together */
  const char* cpu_kernels; /* "auto" or a name that moerun_build_info_json() lists */
} moerun_options;

typedef struct moerun_sampling {
  size_t struct_size;
  int64_t max_new_tokens; /* 0: until a stop token, or until the context is full */
  double temperature;     /* 0: always the most probable token */
  int64_t top_k;          /* 0: all */
  double top_p;
  double min_p;
  double repetition_penalty;
  uint64_t seed;
  const int32_t* stop_token_ids; /* null: the model's own end-of-sequence tokens */
  size_t num_stop_token_ids;     /* at most the vocabulary */
} moerun_sampling;

MOERUN_API const char* moerun_version(void);
MOERUN_API const char* moerun_last_error(void);

/* Fill a structure with the defaults; struct_size is the caller's sizeof. */
MOERUN_API moerun_status moerun_options_default(moerun_options* options, size_t struct_size);
MOERUN_API moerun_status moerun_sampling_default(moerun_sampling* sampling, size_t struct_size);

/* Loads the model in directory `path`; `options` may be null. */
MOERUN_API moerun_status moerun_open(const char* path, const moerun_options* options,
                                     moerun_model** model);
/* Generations that are still open keep what they need. */
MOERUN_API void moerun_close(moerun_model* model);

MOERUN_API int64_t moerun_vocab_size(const moerun_model* model);
MOERUN_API int64_t moerun_context_length(const moerun_model* model);

/* logits[t * vocab_size + v] for every token; num_logits must be num_tokens * vocab_size. */
MOERUN_API moerun_status moerun_forward(moerun_model* model, const int32_t* token_ids,
                                        size_t num_tokens, float* logits, size_t num_logits);

/* Starts a generation; `sampling` may be null. The first moerun_generation_next runs the prompt. */
MOERUN_API moerun_status moerun_generate(moerun_model* model, const int32_t* token_ids,
                                         size_t num_tokens, const moerun_sampling* sampling,
                                         moerun_generation** generation);
/* MOERUN_OK and a token, or MOERUN_END. */
MOERUN_API moerun_status moerun_generation_next(moerun_generation* generation, int32_t* token_id);
MOERUN_API void moerun_generation_close(moerun_generation* generation);

/* Statistics of the model and its last generation as a JSON object. Writes at most `capacity`
 * bytes, the terminating zero included, and sets *length to the length of the whole text without
 * it; call with capacity 0 to learn that. */
MOERUN_API moerun_status moerun_stats_json(const moerun_model* model, char* buffer, size_t capacity,
                                           size_t* length);

#ifdef __cplusplus
}
#endif

#endif /* MOERUN_H */
