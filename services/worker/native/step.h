// The native step: a forward pass of a Llama-family model in bf16 on the CPU, as one call.
//
// Owns the contract between Python (ctypes) and the library; plain C types only. Nothing here takes
// ownership of memory that the caller passes, unless it says so. All calls for one model come from
// one thread at a time, but for `calumma_adapter_*`, which may come from another while a pass runs
// that does not use that adapter's layers.
//
// Numbers: weights, keys, values and adapters are bf16; activations between linears are bf16;
// residual stream, norms, rotation, softmax and all sums are fp32. What is computed for a row does
// not depend on the other rows of a call: the same bits come out whatever its batch mates are, and
// whether its context was computed in one call or in many.

#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CALUMMA_ABI 1

typedef uint16_t calumma_bf16;  // the upper half of an fp32

typedef struct calumma_model calumma_model;
typedef struct calumma_adapter calumma_adapter;

typedef struct {
  int32_t abi;  // CALUMMA_ABI
  int32_t layers, hidden, ffn, heads, kv_heads, head_dim, vocab;
  int32_t block_tokens;   // tokens per KV block
  int32_t max_positions;  // rows of the rotation tables
  int32_t threads;        // that compute, the calling one included
  float norm_eps;
} calumma_config;

// The linears of a layer. Outputs of fused ones lie side by side: q, k, v and gate, up.
enum { CALUMMA_QKV, CALUMMA_O, CALUMMA_GATE_UP, CALUMMA_DOWN, CALUMMA_HEAD };
// The norms: two per layer, one behind the last (any layer), and those over heads of q and k.
enum { CALUMMA_NORM_INPUT, CALUMMA_NORM_FFN, CALUMMA_NORM_FINAL, CALUMMA_NORM_Q, CALUMMA_NORM_K };
// What an adapter may target. Layer -1 is the embedding, layer `layers` the head.
enum {
  CALUMMA_Q_PROJ, CALUMMA_K_PROJ, CALUMMA_V_PROJ, CALUMMA_O_PROJ,
  CALUMMA_GATE_PROJ, CALUMMA_UP_PROJ, CALUMMA_DOWN_PROJ,
  CALUMMA_EMBED_TOKENS, CALUMMA_LM_HEAD
};

// The instruction set that would be used here, as a word for logs; NULL if this CPU has none of
// those that the library has code for. Needs no model.
const char *calumma_isa(void);
// Why the last failing call of this thread failed.
const char *calumma_error(void);

// NULL on failure: shapes that are not supported, or no memory.
calumma_model *calumma_open(const calumma_config *config);
void calumma_close(calumma_model *model);

// Weights are read and packed; the caller may drop them. 0 on success.
// weight: [out, in] row-major; bias: [out] fp32 or NULL. The head's `layer` is ignored.
int calumma_set_linear(calumma_model *model, int32_t layer, int32_t linear,
                       const calumma_bf16 *weight, int32_t out, int32_t in, const float *bias);
int calumma_set_norm(calumma_model *model, int32_t layer, int32_t norm, const float *weight,
                     int32_t size);
// [vocab, hidden]. Kept, not copied: it must stay until the model is closed.
int calumma_set_embedding(calumma_model *model, const calumma_bf16 *weight);
// cos, sin: [max_positions, head_dim / 2]. Copied. A rotated head x = (a, b), in halves, is
// (a cos - b sin, b cos + a sin).
int calumma_set_rotation(calumma_model *model, const float *cos, const float *sin);
// Layers without rotation (some SmolLM3 layers): 0. Default: 1.
int calumma_set_rotates(calumma_model *model, int32_t layer, int32_t rotates);
// `blocks` blocks of 2 * layers * kv_heads * block_tokens * head_dim bf16 values each; the layout
// within a block is the library's own. Kept, not copied. Memory that was never written must be 0.
int calumma_set_cache(calumma_model *model, calumma_bf16 *memory, int32_t blocks);
// Zero these blocks.
void calumma_clear_blocks(calumma_model *model, const int32_t *blocks, int32_t count);

// Adapters. a: [rank, in], bt: [rank, out], row-major, kept, not copied: what is added to a row x is
// scale * x aT bt. Their rows are read as they are: an adapter costs no copy.
calumma_adapter *calumma_adapter_open(calumma_model *model);
int calumma_adapter_set(calumma_adapter *adapter, int32_t layer, int32_t module, int32_t rank,
                        const calumma_bf16 *a, const calumma_bf16 *bt, float scale);
// No pass may use it any more.
void calumma_adapter_close(calumma_adapter *adapter);

// Consecutive rows of one sequence.
typedef struct {
  int32_t start;           // position of the first row
  int32_t rows;
  const int32_t *blocks;   // position p lies in blocks[p / block_tokens]
  const calumma_adapter *adapter;  // NULL: the base model
} calumma_segment;

// Rows that go through layers first_layer .. until_layer - 1 together.
typedef struct {
  int32_t rows, segments;
  const int32_t *token_ids;  // [rows]; read when first_layer is 0
  const calumma_segment *segment;  // [segments], in the order of the rows
  int32_t first_layer, until_layer;
  float *hidden;             // [rows, hidden]: read unless first_layer is 0, written at the end
  int32_t wanted;            // rows whose logits are wanted; only if until_layer is the last
  const int32_t *wanted_rows;  // [wanted], ascending
} calumma_pass;

// Where the logits go: one entry per wanted row of all passes, in order.
typedef struct {
  int32_t *best;       // [n] the id with the highest logit, the first of equals
  float *best_score;   // [n] that logit; NaN if any logit of the row is NaN
  float **logits;      // [n] pointers to [vocab] fp32, or NULL for rows that need only the best
} calumma_scores;

// Runs the passes, in order, then the head over all wanted rows at once. 0 on success. Blocks until
// done; the calling thread computes too. `scores` may be NULL if nothing is wanted.
int calumma_run(calumma_model *model, const calumma_pass *passes, int32_t count,
                const calumma_scores *scores);

#ifdef __cplusplus
}
#endif
