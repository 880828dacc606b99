/* fourmoe: Mixture-of-Experts layers on 4-bit NVFP4 weights. The C ABI.
 *
 * Handles are opaque. Every function that can fail returns a fourmoe_status; fourmoe_last_error() then gives one line
 * that names the tensor, the expert, what was expected and what was found. Where a call fails, the handle or the
 * numbers that it was to give stay as they were. No function throws, prints, aborts or exits. A handle may be used from
 * several threads at once; freeing it, or a refit, may not overlap another use. Structs that may grow begin with
 * struct_size: set it to sizeof the struct (another size is refused), and everything else to zero; where zero stands
 * for another value, or is refused, the field says so.
 */
#ifndef FOURMOE_FOURMOE_H
#define FOURMOE_FOURMOE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FOURMOE_API __attribute__((visibility("default")))
#else
#define FOURMOE_API
#endif

#define FOURMOE_VERSION_MAJOR 0
#define FOURMOE_VERSION_MINOR 1
#define FOURMOE_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

/* 0 is success; every other value is a reason for refusal (fourmoe_status_name, fourmoe_status_text). Any function may
 * return argument_invalid (null, out of range, or two that contradict each other), out_of_memory and internal, and for
 * a layer on a GPU device_failed; other reasons stand with the functions. */
typedef int fourmoe_status;
#define FOURMOE_OK 0

typedef enum fourmoe_dtype {
  FOURMOE_F32 = 0,
  FOURMOE_F16 = 1,
  FOURMOE_BF16 = 2,
  FOURMOE_I32 = 3,
  FOURMOE_I64 = 4,
  FOURMOE_U8 = 5 /* E2M1 pairs, or E4M3 scales */
} fourmoe_dtype;

typedef enum fourmoe_encoding {
  FOURMOE_WEIGHTS_NVFP4 = 0, /* E2M1 pairs (low nibble: even column), an E4M3 scale a block of 16, a global scale */
  FOURMOE_WEIGHTS_MXFP4 = 1, /* E2M1 pairs, an E8M0 scale a block of 32 */
  FOURMOE_WEIGHTS_BF16 = 2,
  FOURMOE_WEIGHTS_F16 = 3,
  FOURMOE_WEIGHTS_F32 = 4,
  FOURMOE_WEIGHTS_FP8 = 5 /* E4M3, one global scale */
} fourmoe_encoding;

typedef enum fourmoe_precision {
  FOURMOE_W4A16 = 0, /* activations bf16 or f16, weights exact */
  FOURMOE_W4A4 = 1,  /* activations and the intermediate quantised to NVFP4 */
  /* both quantised to int8 in groups of 32 columns: lossy, 1 to 2 % (rel-L2) from w4a16's output. 4-bit weights, on the
     host; never chosen unless asked for */
  FOURMOE_W4A8_INT8 = 2
} fourmoe_precision;

typedef enum fourmoe_activation {
  FOURMOE_SWIGLU = 0,
  FOURMOE_SWIGLU_CLAMPED = 1, /* gpt-oss: alpha, beta, limit */
  FOURMOE_GEGLU_ERF = 2,
  FOURMOE_GEGLU_TANH = 3,
  FOURMOE_RELU2 = 4 /* not gated */
} fourmoe_activation;

typedef enum fourmoe_score {
  FOURMOE_SOFTMAX = 0,
  FOURMOE_SIGMOID = 1,
  FOURMOE_SQRT_SOFTPLUS = 2,
  FOURMOE_SCORE_NONE = 3
} fourmoe_score;

/* A matrix of activations, logits, ids or routing weights, in memory of the layer's device. */
typedef struct fourmoe_tensor {
  void* data;     /* [rows, cols] dtype, at a multiple of its size, rows `stride` apart; caller's; null: not given */
  int32_t dtype;  /* fourmoe_dtype */
  int32_t unused; /* 0 */
  int64_t rows;
  int64_t cols;
  int64_t stride; /* elements between the starts of two rows, >= cols; of one row it does not matter */
} fourmoe_tensor;

/* One projection of one expert, [rows = outputs, cols = inputs]. data and scales are in host memory or, for a layer on
 * a GPU, in the memory of that GPU, each as it likes: there they are read in place, once what fills them has ended. */
typedef struct fourmoe_matrix {
  const uint8_t* data;   /* [rows, cols/2] E2M1 pairs, or [rows, cols] dense; any alignment; caller's */
  const uint8_t* scales; /* [rows, cols/16] E4M3 or [rows, cols/32] E8M0; null for dense */
  int64_t data_stride;   /* bytes between the starts of two rows of data; 0: rows are contiguous */
  int64_t scales_stride; /* bytes between the starts of two rows of scales; 0: rows are contiguous */
  float global_scale;    /* multiplier of the whole matrix, finite and above 0; 1 for MXFP4, bf16, f16 and f32 */
  int32_t unused;        /* 0 */
} fourmoe_matrix;

typedef struct fourmoe_expert {
  fourmoe_matrix gate;    /* [inter, hidden]; not read when the activation has no gate */
  fourmoe_matrix up;      /* [inter, hidden] */
  fourmoe_matrix down;    /* [hidden, inter] */
  const float* gate_bias; /* [inter]; null for none. Biases are the caller's and may lie where matrices may */
  const float* up_bias;   /* [inter]; null for none */
  const float* down_bias; /* [hidden]; null for none */
  float input_scale;      /* w4a4: global scale of the tokens, a multiplier; 0 means 1 */
  float inter_scale;      /* w4a4: global scale of the intermediate, a multiplier; 0 means 1 */
} fourmoe_expert;

/* A layer given tensor by tensor. Matrices and biases in host memory must stay, unchanged, until the layer is freed or
 * refitted; those in the memory of the layer's GPU may be freed as soon as the layer is made. All else is in host
 * memory and is copied. Such a layer has no router and no shared experts. */
typedef struct fourmoe_layer_desc {
  size_t struct_size;
  int32_t hidden;                     /* multiple of 16, for MXFP4 of 32; at most 2^20 */
  int32_t inter;                      /* likewise */
  int32_t experts;                    /* of the whole layer, 1..1024 */
  int32_t top_k;                      /* 1..32, at most experts */
  int32_t first_expert;               /* first one held here */
  int32_t local_experts;              /* held here; 0: all */
  int32_t encoding;                   /* fourmoe_encoding of all experts */
  int32_t activation;                 /* fourmoe_activation */
  float alpha, beta, limit;           /* of FOURMOE_SWIGLU_CLAMPED, all three: gpt-oss has 1.702, 1, 7; limit above 0 */
  int32_t score;                      /* fourmoe_score. It and all up to scale are used with logits only */
  int32_t groups;                     /* of equally many experts; 0: 1 */
  int32_t groups_kept;                /* 0: 1 */
  int32_t group_best;                 /* 1 or 2; 0: 2 */
  int32_t renormalise;                /* 0 or 1 */
  float scale;                        /* routed scaling factor; 0: 1 */
  int32_t weight_on_input;            /* 0 or 1 (needs top_k 1): weights multiply tokens, not results */
  const float* selection_bias;        /* [experts], finite, used with logits only; null for none */
  const fourmoe_expert* expert_table; /* [local_experts] */
} fourmoe_layer_desc;

/* The library's own threads and the memory of packed weights follow the environment, read once:
 * FOURMOE_AFFINITY=none|cores, FOURMOE_MEMORY=local|interleave (by default interleave on hosts of several NUMA nodes),
 * and FOURMOE_CPU_LEVEL. */

/* A thread pool of the host program. run() must call task(task_context, i) once for each i in [0, count), on any
 * threads and in any order, and return when all have returned. It is called while layers are made and by every call on
 * the host, so from as many threads at once as call; a task calls no run(). */
typedef struct fourmoe_executor {
  void* context;   /* handed to run; null is fine */
  int32_t threads; /* most tasks at work at once, >= 1 */
  void (*run)(void* context, int64_t count, void (*task)(void* task_context, int64_t index), void* task_context);
} fourmoe_executor;

/* Strings are copied. */
typedef struct fourmoe_options {
  size_t struct_size;
  const char* backend;              /* "auto" (also null), or "cpu", "reference", or on a GPU "sm90" */
  int32_t precision;                /* fourmoe_precision */
  int32_t max_tokens;               /* of one pass, longer calls are split; sizes the workspace; 0: 1024 */
  int32_t threads;                  /* 0 to 1024, 0: all; ignored with an executor */
  const fourmoe_executor* executor; /* null: a pool of the library. Copied; context and run outlive the layer */
  const char* device;               /* "host" (also null), or "cuda:0", "cuda:1", ...: where the layer lives */
  int32_t batch_invariant;          /* 1: a token's bits do not depend on how many others a call has */
  int32_t unused;                   /* 0 */
  const char* tuning;               /* file of choices measured by `fourmoe tune`; null: the one that FOURMOE_TUNING or
                                       the user's cache has; "": none. What is wrong in it is left out, unreported */
} fourmoe_options;

/* One call. Give router_logits, or topk_ids with topk_weights, or neither: then the checkpoint's own router is used.
 * All pointers, the workspace too, are to memory of the layer's device, and all are the caller's. What is written
 * shares no memory with anything else of the call. On a GPU all of it stays until the stream has done the work, and
 * rows of hidden_states and output begin at multiples of 16 bytes, those of E2M1 pairs at multiples of 4. */
typedef struct fourmoe_call {
  size_t struct_size;
  fourmoe_tensor hidden_states; /* [T, hidden] bf16|f16|f32; with hidden_scales [T, hidden/2] u8, E2M1 pairs */
  fourmoe_tensor hidden_scales; /* [T, hidden/16] u8, E4M3: w4a4 of tokens that are NVFP4 already, a value being code *
                                   scale * the expert's input_scale. Then give logits or picks, to a layer without
                                   shared experts and weight_on_input. Null: hidden_states are values */
  fourmoe_tensor router_logits; /* [T, experts] f32|f16|bf16 */
  fourmoe_tensor topk_ids;      /* [T, top_k] i32|i64 of the whole layer; -1 is no pick; not local: skipped */
  fourmoe_tensor topk_weights;  /* [T, top_k] f32|f16|bf16; used as they are */
  fourmoe_tensor output;        /* [>= T, hidden] f32|f16|bf16; overwritten, rows beyond T untouched */
  int32_t* picked_ids;          /* [T, top_k] receives the picks, -1 for none; null: not wanted */
  float* picked_weights;        /* [T, top_k] receives their weights; null: not wanted */
  void* stream;                 /* cudaStream_t of the work; null: the (legacy) default one; not read on the host */
} fourmoe_call;

/* What fourmoe_layer_get_info fills in; the caller sets struct_size alone. */
typedef struct fourmoe_layer_info {
  size_t struct_size;
  int32_t hidden, inter, experts, top_k, first_expert, local_experts;
  int32_t encoding;   /* fourmoe_encoding */
  int32_t activation; /* fourmoe_activation */
  int32_t precision;  /* fourmoe_precision */
  int32_t has_router; /* 1: calls without logits and picks are accepted */
  int32_t has_shared; /* 1: shared experts are computed and added */
  int32_t max_tokens;
  int64_t weight_bytes;    /* of the routed experts, as the checkpoint stores them */
  int64_t packed_bytes;    /* memory that packing took; 0 where the backend reads the checkpoint's own bytes */
  int64_t workspace_bytes; /* that one call needs */
  int32_t device;          /* -1: the host; else the number of the GPU */
  int32_t unused;          /* 0 */
} fourmoe_layer_info;

typedef struct fourmoe_checkpoint fourmoe_checkpoint;
typedef struct fourmoe_layer fourmoe_layer;

/* "0.1.0" */
FOURMOE_API const char* fourmoe_version(void);

/* The stable name of a status ("tensor_mismatch") and its meaning in one sentence; "unknown" for other numbers. */
FOURMOE_API const char* fourmoe_status_name(fourmoe_status status);
FOURMOE_API const char* fourmoe_status_text(fourmoe_status status);

/* What the calling thread's last failed call refused, one line; "" before the first, and where memory is out. Valid
 * until its next failure. */
FOURMOE_API const char* fourmoe_last_error(void);

/* Opens a folder with config.json, a .safetensors file beside its config.json, or a .gguf file; reads and validates
 * headers only. Refusals, among others: file_unreadable, file_malformed, tensor_missing, tensor_mismatch,
 * family_unknown, and what ends in _unsupported where the library does not compute what the model has. */
FOURMOE_API fourmoe_status fourmoe_checkpoint_open(const char* path, fourmoe_checkpoint** checkpoint);
FOURMOE_API void fourmoe_checkpoint_close(fourmoe_checkpoint* checkpoint); /* null is fine; layers stay valid */

/* Indices of the MoE layers in the model, ascending. Writes up to `capacity` of them to layers[capacity], null for a
 * capacity of 0; *count receives how many there are. */
FOURMOE_API fourmoe_status fourmoe_checkpoint_layers(const fourmoe_checkpoint* checkpoint, int32_t* layers,
                                                     int64_t capacity, int64_t* count);

/* Loads a layer, validates its scales and packs its weights for the chosen backend. The checkpoint's files are mapped:
 * they may be renamed or removed afterwards, not written over in place. options may be null. Refusals, beside those of
 * open, among others: layer_missing, scale_invalid, global_invalid, value_not_finite, no_plan, not_built,
 * device_missing. */
FOURMOE_API fourmoe_status fourmoe_layer_load(const fourmoe_checkpoint* checkpoint, int32_t layer,
                                              const fourmoe_options* options, fourmoe_layer** out);

/* The same from tensors in memory. Refusals, among others: shape_, experts_, picks_, routing_, precision_unsupported,
 * scale_invalid, value_not_finite, memory_misplaced, no_plan, not_built, device_missing. */
FOURMOE_API fourmoe_status fourmoe_layer_create(const fourmoe_layer_desc* desc, const fourmoe_options* options,
                                                fourmoe_layer** out);
FOURMOE_API void fourmoe_layer_free(fourmoe_layer* layer); /* null is fine */

/* No refusals but argument_invalid. */
FOURMOE_API fourmoe_status fourmoe_layer_get_info(const fourmoe_layer* layer, fourmoe_layer_info* info);

/* Computes the layer. workspace: at least fourmoe_layer_info.workspace_bytes, aligned to 64; null: the layer's own, and
 * calls then take turns. Calls that overlap need workspaces of their own. T may be 0. Refusals, among others:
 * dtype_unsupported, stride_unsupported, tensor_missing (no router), pick_out_of_range, value_not_finite (logits),
 * scale_invalid (of hidden_scales), workspace_too_small, memory_misplaced. What the output then holds is not said. */
FOURMOE_API fourmoe_status fourmoe_layer_run(fourmoe_layer* layer, const fourmoe_call* call, void* workspace,
                                             int64_t workspace_bytes);

/* On a GPU run only enqueues, so that a CUDA graph can capture it (with a workspace given, or after a first call
 * outside of the capture). This waits for the stream and returns what kernels found wrong, as a pick out of range;
 * without it the next run returns that, and does nothing else. Calls without a workspace are put in order, but for
 * captured ones, whose replays the caller orders. On the host: FOURMOE_OK at once. */
FOURMOE_API fourmoe_status fourmoe_layer_wait(fourmoe_layer* layer, void* stream);

/* Replaces the weights of a layer made by fourmoe_layer_create by others of the same shapes; on a GPU the packed
 * weights keep their addresses, so that captured graphs stay valid. No call may be under way; on a GPU this waits for
 * the work of all streams. A refusal (tensor_mismatch, or as create) leaves the old weights. Routing is not changed but
 * for selection_bias, which is there where it was. */
FOURMOE_API fourmoe_status fourmoe_layer_refit(fourmoe_layer* layer, const fourmoe_layer_desc* desc);

#ifdef __cplusplus
}
#endif

#endif /* FOURMOE_FOURMOE_H */
