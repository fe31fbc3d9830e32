/* The C interface of the native CPU runtime. docs/numerics.md defines every result to the bit.
 *
 * Functions that return a pointer return NULL, and those that return int return nonzero, when they fail;
 * us_error() then says why (per thread, until the next failure). Memory passed in is only read during the call, except
 * where it says otherwise. Objects may be used from several threads; calls on one runtime take turns.
 * The caller checks what a user can get wrong (tokens, positions, parents); what is checked here is what would
 * otherwise read or write outside of memory.
 */
#ifndef UNDERSTUDY_CPU_H
#define UNDERSTUDY_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_API __attribute__((visibility("default")))
#define US_ABI_VERSION 6

typedef struct us_runtime us_runtime;
typedef struct us_matrix us_matrix;
typedef struct us_model us_model;

/* Number types: 0 float32, 1 float16, 2 bfloat16. */

/* Weights as they lie in a file (deploy/formats/packed.py). */
typedef struct {
  int64_t outputs, inputs;
  const void* codes;       /* packed: uint32 [rows][inputs·bits/32]; plain: numbers [rows][inputs] of scale_type */
  const void* scale;       /* packed: [rows][inputs/group_size] of scale_type */
  const void* minimum;     /* packed: zero points uint32 [⌈rows·bits/32⌉][groups], minima like scale, or NULL:
                            * symmetric */
  const float* bias;       /* [outputs] or NULL */
  const int64_t* row_ids;  /* [outputs]: which rows of the source these are; NULL: all, in order */
  int32_t bits, group_size, scale_type;
  int32_t is_plain;        /* quantized here in groups of 32: to int8, or to 4 bits with minima */
  int32_t has_float_minimum;
  int32_t is_bytes;        /* 8 bits: codes int8 [rows][inputs], code − 128; zero points int8 [rows][groups] alike */
  /* How what it multiplies is quantized. 0 bits: in groups of 32, as docs/numerics.md says for layers whose file says
   * nothing; otherwise 4 or 8, with one scale a row, and group_size may be `inputs`: a scale per output. */
  int32_t input_bits;
  float input_scale;       /* of every row; 0: each row finds its own */
  const int32_t* flatten;  /* [inputs]: the channel that a column multiplies a copy of, copied here; or NULL */
} us_weights;

typedef struct {
  int32_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size;
  int32_t has_qk_norm;
  float rms_norm_eps;
  int32_t num_features;         /* 0; or, of an EAGLE head (one layer), how many of its target's states a row reads */
  int32_t norm_before_residual; /* of a head */
} us_shape;

/* How to choose a token; deploy/runtime/sampling.py checks the ranges. */
typedef struct {
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k;
  uint64_t seed, sample_index;
} us_sampling;

/* One forward. parent: an earlier row, or -1. `sampling` (one per head row) asks for tokens.
 *
 * A call that continues adds its rows to the provisional ones of the calls before it. Parents are then, as the rows
 * given to us_model_keep, indices into all of those: the first row of this call is row number so-many-there-were. All
 * else (head rows, taps) counts this call's own rows.
 *
 * A row of a head reads `features`; where the call has none, the output of its parent, a row of an earlier call. */
typedef struct {
  int64_t num_rows;
  const int32_t *tokens, *positions, *parents;
  const int64_t* sequences;
  int64_t num_taps;
  const int32_t* tap_layers; /* ascending, each once */
  float* taps;               /* [num_taps][num_rows][hidden] */
  int64_t num_head_rows;
  const int64_t* head_rows;
  float* logits; /* [num_head_rows][head outputs], or NULL */
  const us_sampling* sampling;
  int64_t* chosen; /* [num_head_rows]: token ids, -1 where a logit is not finite; or NULL */
  int32_t continues;
  const float* features;  /* [num_rows][num_features · hidden], or NULL */
  int32_t num_candidates; /* of every head row, best first; 0 asks for none */
  int64_t* candidates;    /* [num_head_rows][num_candidates]: token ids, -1 behind the last one there is; all -1 where a
                           * logit is not finite */
  float* scores;          /* [num_head_rows][num_candidates] or NULL: logarithms of what they are worth */
} us_call;

/* One draft: reads the next tokens of a sequence, keeps their rows, and drafts what may follow the last of them. */
typedef struct {
  int64_t sequence, num_tokens;
  const int32_t* tokens;
  const float* features; /* [num_tokens][num_features · hidden] of a head, or NULL */
  const us_sampling* sampling;
  int32_t depth, width, num_nodes; /* deploy/runtime/tree.py: TreeLimits */
  double min_probability, min_gain;
  int32_t *drafted, *parents; /* out, [num_nodes]: tokens; earlier nodes, -1 for what follows the text */
  float* scores;              /* out, [num_nodes]: logarithm of the path's probability */
} us_draft;
#define US_MOST_NODES 64
#define US_MOST_WIDTH 16

US_API int us_abi_version(void);
US_API const char* us_error(void);

/* isa: "scalar", "avx2", "avxvnni" or "avx512vnni". */
US_API int us_isa_is_supported(const char* isa);

/* A pool of `threads` threads, the calling one included, and the kernels of one instruction set. */
US_API us_runtime* us_runtime_create(const char* isa, int32_t threads);
US_API void us_runtime_destroy(us_runtime*);

/* Single operations, for tests and measurements. */
US_API us_matrix* us_matrix_create(us_runtime*, const us_weights*);
US_API void us_matrix_destroy(us_matrix*);
US_API int64_t us_matrix_bytes(const us_matrix*);
/* x [rows][inputs, or channels where they are flattened] → y [rows][outputs], `repeats` times over. */
US_API int us_matrix_multiply(us_matrix*, const float* x, int64_t rows, float* y, int64_t repeats);
US_API int us_exp(us_runtime*, const float* x, int64_t n, float* y);
US_API int us_to_half(us_runtime*, const float* x, int64_t n, uint16_t* y);
/* path: tokens so far, NULL if none. ids: ascending token id of each logit, or NULL: 0, 1, 2, … Returns the token;
 * -1: a logit is not finite; -2: an error. */
US_API int64_t us_sample(us_runtime*, const float* logits, int64_t n, const us_sampling*, const int32_t* path,
                         int64_t path_length, int64_t position, const int64_t* ids);
/* The `count` best tokens, best first, and the logarithms of what they are worth (NULL: not wanted). Returns how many
 * there are; -1: a logit is not finite; -2: an error. */
US_API int64_t us_candidates(us_runtime*, const float* logits, int64_t n, const us_sampling*, const int32_t* path,
                             int64_t path_length, int64_t position, const int64_t* ids, int32_t count, int64_t* tokens,
                             float* scores);
/* Ceilings: bytes per second of all threads reading `bytes`; multiply-adds per second of the integer dot product. */
US_API double us_measure_read(us_runtime*, int64_t bytes, int64_t repeats);
US_API double us_measure_dot(us_runtime*, int64_t repeats);

/* A model is created empty and filled; us_model_finish checks that nothing is missing. */
US_API us_model* us_model_create(us_runtime*, const us_shape*);
US_API void us_model_destroy(us_model*);
/* which: 0 q, 1 k, 2 v, 3 o, 4 gate, 5 up, 6 down, 7 what turns features into the state (heads) */
US_API int us_model_set_linear(us_model*, int32_t layer, int32_t which, const us_weights*);
/* which: 0 input norm, 1 post-attention norm, 2 q norm, 3 k norm, 4 norm of the state (heads); layer -1: the final
 * norm */
US_API int us_model_set_norm(us_model*, int32_t layer, int32_t which, const float* values, int64_t count);
/* What gives logits. ids: the tokens of its outputs, ascending, where its vocabulary is trimmed; else NULL. */
US_API int us_model_set_head(us_model*, const us_weights*, const int64_t* ids);
/* A tied embedding in int8. Without a call, and with a head over the whole vocabulary, the head serves. */
US_API int us_model_set_embedding_int8(us_model*, const us_weights*);
/* An untied embedding [vocab][hidden]; `values` must stay readable as long as the model lives. */
US_API int us_model_set_embedding(us_model*, const void* values, int32_t number_type);
/* The embedding of another model, finished and of the same size, which must live as long as this one. */
US_API int us_model_share_embedding(us_model*, const us_model* other);
US_API int us_model_finish(us_model*);
/* cos and sin [count][head_dim/2] of the positions that follow those given so far. */
US_API int us_model_add_rope(us_model*, const float* cosine, const float* sine, int64_t count);
US_API int64_t us_model_weight_bytes(const us_model*);
US_API int64_t us_model_cache_bytes(const us_model*);

/* A row follows `parent`, or what its sequence's cache holds. Drops all rows that were not kept, unless the call
 * continues. */
US_API int us_model_forward(us_model*, const us_call*);
/* How many nodes were drafted; -1: a logit is not finite; -2: an error. Either leaves the cache as it was. Drops all
 * rows that were not kept. */
US_API int64_t us_model_draft(us_model*, const us_draft*);
/* rows: indices into the last call and those that it continued, one path that begins where the cache ends. */
US_API int us_model_keep(us_model*, int64_t sequence, const int32_t* rows, int64_t count);
/* Forgets tokens from position `length` on. */
US_API int us_model_truncate(us_model*, int64_t sequence, int64_t length);
US_API int64_t us_model_length(const us_model*, int64_t sequence);
US_API void us_model_reset(us_model*, int64_t sequence);
/* Times of the forward passes from now on, summed by kind of phase; 0 ends it. */
US_API int us_model_time_phases(us_model*, int32_t is_wanted);
#define US_NUM_TIMES 8
/* seconds [US_NUM_TIMES]: other, quantize, qkv, attention, output, mlp, head, sampling. Inputs of few rows are
 * quantized by every thread within the phase of the linear layer that reads them. */
US_API void us_model_phase_times(const us_model*, double* seconds);

#ifdef __cplusplus
}
#endif

#endif
