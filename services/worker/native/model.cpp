// The functions of the library, but for what a step computes: shapes are checked, weights packed
// and kept. No exception leaves them.

#include "model.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

using namespace calumma;

namespace {

constexpr int kThreadsMax = 1024;
// What a factor of the arithmetic on sizes may be: products of two stay below 2^62.
constexpr int kSizeMax = 1 << 24;

thread_local char last_error[256];

int fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return -1;
}

#if defined(__x86_64__)
// Whether the processor has the instructions, and the system keeps their registers.
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  constexpr unsigned kOsSave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsSave) == 0) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kVectorState = 0xe6;  // SSE, AVX, masks and both parts of zmm
  if ((low & kVectorState) != kVectorState) return false;
  constexpr unsigned kSets = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & kSets) != kSets) return false;
  constexpr unsigned kBf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16) != 0;
}
#else
bool has_avx512_bf16() { return false; }
#endif

// Calls what may throw; -1 and an error if it did.
template <class Act>
int guarded(Act act) {
  try {
    return act();
  } catch (const std::exception &error) {
    return fail("%s", error.what());
  } catch (...) {
    return fail("unknown error");
  }
}

const char *config_fault(const calumma_config &c) {
  if (c.abi != CALUMMA_ABI) return "the library speaks another version of the contract";
  for (int size : {c.layers, c.hidden, c.ffn, c.heads, c.kv_heads, c.head_dim, c.vocab,
                   c.block_tokens, c.max_positions, c.threads}) {
    if (size < 1 || size > kSizeMax) return "a size is out of range";
  }
  if (c.hidden % 2 != 0 || c.ffn % 2 != 0) return "hidden and ffn must be even";
  if (c.head_dim % 2 != 0 || c.head_dim > kHeadDimMax) {
    return "head_dim must be even and at most 256";
  }
  if (c.heads % c.kv_heads != 0) return "heads must be a multiple of kv_heads";
  if (int64_t{c.heads} * c.head_dim > kSizeMax) return "the heads are too wide";
  if (c.threads > kThreadsMax) return "too many threads";
  if (!(c.norm_eps >= 0.0f && c.norm_eps < 1.0f)) return "norm_eps is out of range";
  return nullptr;
}

// The linear a caller means, and NULL if there is none.
Linear *find_linear(calumma_model &model, int layer, int linear) {
  if (linear == CALUMMA_HEAD) return &model.head;
  if (layer < 0 || layer >= model.config.layers) return nullptr;
  Layer &at = model.layers[layer];
  switch (linear) {
    case CALUMMA_QKV: return &at.qkv;
    case CALUMMA_O: return &at.o;
    case CALUMMA_GATE_UP: return &at.gate_up;
    case CALUMMA_DOWN: return &at.down;
    default: return nullptr;
  }
}

std::vector<float> *find_norm(calumma_model &model, int layer, int norm) {
  if (norm == CALUMMA_NORM_FINAL) return &model.final_norm;
  if (layer < 0 || layer >= model.config.layers) return nullptr;
  Layer &at = model.layers[layer];
  switch (norm) {
    case CALUMMA_NORM_INPUT: return &at.input_norm;
    case CALUMMA_NORM_FFN: return &at.ffn_norm;
    case CALUMMA_NORM_Q: return &at.q_norm;
    case CALUMMA_NORM_K: return &at.k_norm;
    default: return nullptr;
  }
}

// Inputs and outputs of what an adapter may target; 0 for what there is not.
struct Shape {
  int in, out;
};

Shape module_shape(const calumma_model &model, int layer, int module) {
  const calumma_config &c = model.config;
  if (module == CALUMMA_EMBED_TOKENS) return layer == -1 ? Shape{c.vocab, c.hidden} : Shape{};
  if (module == CALUMMA_LM_HEAD) return layer == c.layers ? Shape{c.hidden, c.vocab} : Shape{};
  if (layer < 0 || layer >= c.layers) return {};
  switch (module) {
    case CALUMMA_Q_PROJ: return {c.hidden, model.q_width()};
    case CALUMMA_K_PROJ:
    case CALUMMA_V_PROJ: return {c.hidden, model.kv_width()};
    case CALUMMA_O_PROJ: return {model.q_width(), c.hidden};
    case CALUMMA_GATE_PROJ:
    case CALUMMA_UP_PROJ: return {c.hidden, c.ffn};
    case CALUMMA_DOWN_PROJ: return {c.ffn, c.hidden};
    default: return {};
  }
}

// Rows of `values` bf16 each, as far from each other that the same column of neighbours does not
// always fall into the same few lines of the first-level cache.
int row_stride(int values) { return (values + 31) / 32 * 32 + 32; }

}  // namespace

calumma_model::calumma_model(const calumma_config &shape) : config(shape), crew(shape.threads) {
  for (int index = 0; index < config.layers; ++index) {
    Layer layer;
    layer.qkv = make_linear(config.hidden, {q_width(), kv_width(), kv_width()}, false);
    layer.o = make_linear(q_width(), {config.hidden}, false);
    layer.gate_up = make_linear(config.hidden, {config.ffn, config.ffn}, true);
    layer.down = make_linear(config.ffn, {config.hidden}, false);
    layers.push_back(std::move(layer));
  }
  head = make_linear(config.hidden, {config.vocab}, false);
  cache.layers = config.layers;
  cache.kv_heads = config.kv_heads;
  cache.head_dim = config.head_dim;
  cache.block_tokens = config.block_tokens;
  cache.strip_tokens = strip_tokens_of(config.block_tokens);
  step.x.stride = step.head_x.stride = row_stride(config.hidden);
  step.queries.stride = step.attended.stride = row_stride(q_width());
  step.gated.stride = row_stride(config.ffn);
  const int group = config.heads / config.kv_heads;
  threads.resize(config.threads);
  for (ThreadMemory &thread : threads) {
    thread.piece.allocate(sizeof(float) * kGroupPanels * kPanel * kChunkRows);
    thread.attention.allocate(rows_per_item(group) * group, config.head_dim);
  }
}

void calumma_model::reserve(int rows, int wanted, size_t ranks) {
  const auto allocate = [](Activations &at, int count) {
    at.memory.allocate(sizeof(calumma_bf16) * at.stride * count);
  };
  if (rows > step.rows) {
    step.rows = 0;
    for (Activations *at : {&step.x, &step.queries, &step.attended, &step.gated}) {
      allocate(*at, rows);
    }
    step.qkv.allocate(sizeof(float) * qkv_width() * rows);
    step.rows = rows;
  }
  if (wanted > step.wanted) {
    step.wanted = 0;
    allocate(step.head_x, wanted);
    step.best.allocate(sizeof(BestLanes) * config.threads * wanted);
    step.wanted = wanted;
  }
  if (ranks > step.ranks) {
    step.ranks = 0;
    step.s.allocate(sizeof(calumma_bf16) * ranks);
    step.ranks = ranks;
  }
}

// The functions of step.h.

#define CALUMMA_API extern "C" __attribute__((visibility("default")))

CALUMMA_API const char *calumma_isa(void) { return has_avx512_bf16() ? "avx512_bf16" : nullptr; }

CALUMMA_API const char *calumma_error(void) { return last_error; }

CALUMMA_API calumma_model *calumma_open(const calumma_config *config) {
  calumma_model *model = nullptr;
  guarded([&] {
    if (!has_avx512_bf16()) return fail("this CPU has no AVX512-BF16");
    if (const char *fault = config_fault(*config)) return fail("%s", fault);
    model = new calumma_model(*config);
    return 0;
  });
  return model;
}

CALUMMA_API void calumma_close(calumma_model *model) { delete model; }

CALUMMA_API int calumma_set_linear(calumma_model *model, int32_t layer, int32_t linear,
                                   const calumma_bf16 *weight, int32_t out, int32_t in,
                                   const float *bias) {
  Linear *at = find_linear(*model, layer, linear);
  if (at == nullptr) return fail("there is no linear %d in layer %d", linear, layer);
  if (weight == nullptr) return fail("there are no weights");
  if (at->out != out || at->in != in) {
    return fail("linear %d has %d x %d weights, not %d x %d", linear, at->out, at->in, out, in);
  }
  return guarded([&] {
    pack_linear(*at, weight, bias, model->crew);
    return 0;
  });
}

CALUMMA_API int calumma_set_norm(calumma_model *model, int32_t layer, int32_t norm,
                                 const float *weight, int32_t size) {
  std::vector<float> *at = find_norm(*model, layer, norm);
  if (at == nullptr) return fail("there is no norm %d in layer %d", norm, layer);
  const bool is_of_head = norm == CALUMMA_NORM_Q || norm == CALUMMA_NORM_K;
  const int wanted = is_of_head ? model->config.head_dim : model->config.hidden;
  if (weight == nullptr) return fail("there are no weights");
  if (size != wanted) return fail("norm %d has %d weights, not %d", norm, wanted, size);
  return guarded([&] {
    at->assign(weight, weight + size);
    return 0;
  });
}

CALUMMA_API int calumma_set_embedding(calumma_model *model, const calumma_bf16 *weight) {
  if (weight == nullptr) return fail("there are no weights");
  model->embedding = weight;
  return 0;
}

CALUMMA_API int calumma_set_rotation(calumma_model *model, const float *cos, const float *sin) {
  if (cos == nullptr || sin == nullptr) return fail("there are no tables");
  const size_t size = size_t(model->config.max_positions) * (model->config.head_dim / 2);
  return guarded([&] {
    model->cos.assign(cos, cos + size);
    model->sin.assign(sin, sin + size);
    return 0;
  });
}

CALUMMA_API int calumma_set_rotates(calumma_model *model, int32_t layer, int32_t rotates) {
  if (layer < 0 || layer >= model->config.layers) return fail("there is no layer %d", layer);
  model->layers[layer].rotates = rotates != 0;
  return 0;
}

CALUMMA_API int calumma_set_cache(calumma_model *model, calumma_bf16 *memory, int32_t blocks) {
  if (memory == nullptr || blocks < 0) return fail("there is no memory for the cache");
  model->cache.memory = memory;
  model->cache.blocks = blocks;
  return 0;
}

CALUMMA_API void calumma_clear_blocks(calumma_model *model, const int32_t *blocks, int32_t count) {
  const size_t values = model->cache.block_values();
  for (int index = 0; index < count; ++index) {
    if (blocks[index] < 0 || blocks[index] >= model->cache.blocks) continue;
    std::memset(model->cache.memory + values * blocks[index], 0, values * sizeof(calumma_bf16));
  }
}

CALUMMA_API calumma_adapter *calumma_adapter_open(calumma_model *model) {
  calumma_adapter *adapter = nullptr;
  guarded([&] {
    adapter = new calumma_adapter(model, model->config.layers);
    return 0;
  });
  return adapter;
}

CALUMMA_API int calumma_adapter_set(calumma_adapter *adapter, int32_t layer, int32_t module,
                                    int32_t rank, const calumma_bf16 *a, const calumma_bf16 *bt,
                                    float scale) {
  const Shape shape = module_shape(*adapter->model, layer, module);
  if (shape.in == 0) return fail("there is no module %d in layer %d", module, layer);
  if (rank < 1 || rank > kSizeMax) return fail("a rank of %d", rank);
  if (a == nullptr || bt == nullptr) return fail("there are no weights");
  Pair &pair = adapter->pairs[size_t(layer + 1) * kModules + module];
  pair = {a, bt, rank, shape.in, shape.out, scale};
  const int ranks = padded_rank(rank);
  int before = adapter->most_ranks.load();
  while (before < ranks && !adapter->most_ranks.compare_exchange_weak(before, ranks)) {
  }
  return 0;
}

CALUMMA_API void calumma_adapter_close(calumma_adapter *adapter) { delete adapter; }

CALUMMA_API int calumma_run(calumma_model *model, const calumma_pass *passes, int32_t count,
                            const calumma_scores *scores) {
  if (const char *fault = find_fault(*model, passes, count, scores)) return fail("%s", fault);
  return guarded([&] {
    run_passes(*model, passes, count, scores);
    return 0;
  });
}
