// The C ABI over layer.h and checkpoint.h: translates, catches, nothing else.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "checkpoint/checkpoint.h"
#include "format/validate.h"
#include "fourmoe/fourmoe.h"
#include "layer.h"
#include "weights/place.h"

using namespace fourmoe;

struct fourmoe_checkpoint {
  checkpoint::Checkpoint value;
};

struct fourmoe_layer {
  std::unique_ptr<Executor> executor;  // the host's, wrapped; null: the library's
  std::unique_ptr<Layer> value;
};

namespace {

static_assert(FOURMOE_F32 == static_cast<int>(format::Dtype::f32));
static_assert(FOURMOE_U8 == static_cast<int>(format::Dtype::u8));
static_assert(FOURMOE_WEIGHTS_FP8 == static_cast<int>(format::Encoding::fp8));
static_assert(FOURMOE_W4A8_INT8 == static_cast<int>(Precision::w4a8_int8));
static_assert(FOURMOE_RELU2 == static_cast<int>(ActivationKind::relu2));
static_assert(FOURMOE_SCORE_NONE == static_cast<int>(Score::none));

std::string& last_error() {
  thread_local std::string line;
  return line;
}

fourmoe_status fail(Reason reason, std::string_view detail) noexcept {
  try {
    last_error() = detail;
  } catch (const std::bad_alloc&) {
    last_error().clear();  // no memory for the sentence: the reason alone
  }
  return static_cast<fourmoe_status>(reason);
}

// Runs `body`, which returns a Status or throws.
template <class Body>
fourmoe_status guard(const Body& body) {
  try {
    const Status status = body();
    return status.ok() ? FOURMOE_OK : fail(status.reason, status.detail);
  } catch (const Error& error) {
    return fail(error.reason(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(Reason::out_of_memory, "an allocation failed");
  } catch (const std::exception& error) {
    return fail(Reason::internal, error.what());
  }
}

void require(bool condition, const std::string& detail) {
  if (!condition) throw Error(Reason::argument_invalid, detail);
}

void require_finite(const char* name, f32 value) {
  require(std::isfinite(value), fmt::format("{} is {}, expected a finite number", name, value));
}

// An enum value that crossed the ABI as an integer.
template <class Enum>
Enum checked(const char* name, int32_t value, Enum last) {
  require(value >= 0 && value <= static_cast<int32_t>(last),
          fmt::format("{} is {}, expected 0 to {}", name, value, static_cast<int32_t>(last)));
  return static_cast<Enum>(value);
}

template <class Struct>
void check_size(const char* name, const Struct* given) {
  require(given != nullptr, fmt::format("{} is null", name));
  require(given->struct_size == sizeof(Struct),
          fmt::format("{}.struct_size is {}, expected {}", name, given->struct_size, sizeof(Struct)));
}

class HostExecutor final : public Executor {
 public:
  explicit HostExecutor(const fourmoe_executor& host) : host_(host) {}
  i32 threads() const override { return host_.threads; }
  void parallel_for(i64 count, const Task& task) override {
    const auto call = [](void* context, int64_t index) { (*static_cast<const Task*>(context))(index); };
    if (count > 0) host_.run(host_.context, count, call, const_cast<Task*>(&task));
  }

 private:
  fourmoe_executor host_;
};

LayerOptions convert(const fourmoe_options* given, std::unique_ptr<Executor>* host) {
  LayerOptions options;
  if (given == nullptr) return options;
  check_size("options", given);
  if (given->backend != nullptr) options.backend = given->backend;
  if (given->device != nullptr) options.device = parse_device(given->device);
  options.batch_invariant = given->batch_invariant != 0;
  if (given->tuning != nullptr) options.tuning = given->tuning;
  options.precision = checked("options.precision", given->precision, Precision::w4a8_int8);
  require(given->max_tokens >= 0, fmt::format("options.max_tokens is {}, expected at least 0", given->max_tokens));
  require(given->threads >= 0 && given->threads <= kMostThreads,
          fmt::format("options.threads is {}, expected 0 to {}", given->threads, kMostThreads));
  if (given->max_tokens > 0) options.max_tokens = given->max_tokens;
  if (given->executor == nullptr) {
    options.executor = &tbb_executor(given->threads);
    return options;
  }
  require(given->executor->run != nullptr, "options.executor.run is null");
  require(given->executor->threads >= 1, "options.executor.threads is below 1");
  *host = std::make_unique<HostExecutor>(*given->executor);
  options.executor = host->get();
  return options;
}

// What a layer on `device` is made of.
struct Target {
  Problem problem;
  i32 device;  // -1: the host
};

format::Matrix convert(const char* name, i64 expert, const fourmoe_matrix& given, const Target& target, i32 rows,
                       i32 cols) {
  const format::Encoding encoding = target.problem.encoding;
  require(given.data != nullptr, fmt::format("{} of expert {} is null", name, expert));
  require(!format::is_fp4(encoding) || given.scales != nullptr,
          fmt::format("scales of {} of expert {} are null", name, expert));
  require(given.global_scale > 0.0f && given.global_scale < INFINITY,
          fmt::format("global scale of {} of expert {} is {}, expected finite and above 0", name, expert,
                      given.global_scale));
  format::Matrix matrix;
  matrix.data = given.data;
  matrix.scales = given.scales;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.encoding = encoding;
  matrix.global = given.global_scale;
  const i64 tight = format::row_bytes(encoding, cols);
  const i64 tight_scales = format::is_fp4(encoding) ? cols / format::block_of(encoding) : 0;
  matrix.data_stride = given.data_stride != 0 ? given.data_stride : tight;
  matrix.scales_stride = given.scales_stride != 0 ? given.scales_stride : tight_scales;
  require(matrix.data_stride >= tight && matrix.scales_stride >= tight_scales,
          fmt::format("{} of expert {} has rows {} bytes apart (scales {}), expected at least {} ({})", name, expert,
                      matrix.data_stride, matrix.scales_stride, tight, tight_scales));
  const bool host = target.device < 0;
  const bool there = target.device < static_cast<i32>(machine().devices.size());  // if not, the plan is refused
  if (!host && (!there || weights::place_of(matrix.scales, target.device) >= 0)) return matrix;  // checked when packed
  if (const auto bad = format::find_bad_scale(matrix)) {
    throw Error(Reason::scale_invalid, fmt::format("scale [{}, {}] of {} of expert {} is 0x{:02x}: NaN or negative",
                                                   bad->row, bad->block, name, expert, bad->byte));
  }
  return matrix;
}

Problem convert_problem(const fourmoe_layer_desc& desc) {
  Problem p;
  p.hidden = desc.hidden;
  p.inter = desc.inter;
  p.experts = desc.experts;
  p.top_k = desc.top_k;
  p.first_expert = desc.first_expert;
  p.local_experts = desc.local_experts != 0 ? desc.local_experts : desc.experts;
  p.encoding = checked("encoding", desc.encoding, format::Encoding::fp8);
  p.activation.kind = checked("activation", desc.activation, ActivationKind::relu2);
  if (p.activation.kind == ActivationKind::swiglu_clamped) {
    p.activation.alpha = desc.alpha;
    p.activation.beta = desc.beta;
    p.activation.limit = desc.limit;
    require_finite("alpha", desc.alpha);
    require_finite("beta", desc.beta);
    require(desc.limit > 0.0f, fmt::format("limit is {}, expected above 0", desc.limit));
  }
  p.routing.score = checked("score", desc.score, Score::none);
  p.routing.groups = desc.groups != 0 ? desc.groups : 1;
  p.routing.groups_kept = desc.groups_kept != 0 ? desc.groups_kept : 1;
  p.routing.group_best = desc.group_best != 0 ? desc.group_best : 2;
  p.routing.renormalise = desc.renormalise != 0;
  require_finite("scale", desc.scale);
  p.routing.scale = desc.scale != 0.0f ? desc.scale : 1.0f;
  p.routing.weight_on_input = desc.weight_on_input != 0;
  const Verdict verdict = check(p);
  if (!verdict.accepted()) throw Error(verdict.reason, verdict.detail);
  return p;
}

f32 scale_or_one(const char* name, f32 scale) {
  require(scale >= 0.0f && scale < INFINITY, fmt::format("{} is {}, expected finite and not negative", name, scale));
  return scale != 0.0f ? scale : 1.0f;
}

weights::Expert convert_expert(const Target& target, i64 index, const fourmoe_expert& given) {
  const Problem& p = target.problem;
  weights::Expert expert;
  if (p.activation.gated()) expert.gate = convert("gate", index, given.gate, target, p.inter, p.hidden);
  expert.up = convert("up", index, given.up, target, p.inter, p.hidden);
  expert.down = convert("down", index, given.down, target, p.hidden, p.inter);
  expert.gate_bias = given.gate_bias;
  expert.up_bias = given.up_bias;
  expert.down_bias = given.down_bias;
  expert.input_scale = scale_or_one("input_scale", given.input_scale);
  expert.inter_scale = scale_or_one("inter_scale", given.inter_scale);
  return expert;
}

checkpoint::Layer convert(const fourmoe_layer_desc& desc, i32 device) {
  checkpoint::Layer layer;
  layer.problem = convert_problem(desc);
  require(desc.expert_table != nullptr, "expert_table is null");
  const Target target = {layer.problem, device};
  for (i32 e = 0; e < layer.problem.local_experts; ++e) {
    layer.experts.push_back(convert_expert(target, e, desc.expert_table[e]));
  }
  if (desc.selection_bias != nullptr) {
    layer.selection_bias.assign(desc.selection_bias, desc.selection_bias + layer.problem.experts);
  }
  return layer;
}

format::Tensor convert(const char* name, const fourmoe_tensor& given) {
  require(given.rows >= 0 && given.cols >= 0,
          fmt::format("{} is [{}, {}], expected sizes of at least 0", name, given.rows, given.cols));
  format::Tensor tensor;
  if (given.data == nullptr) {
    tensor.rows = given.rows;
    tensor.cols = given.cols;
    return tensor;
  }
  return {given.data, checked(name, given.dtype, format::Dtype::u8), given.rows, given.cols, given.stride};
}

void finish(checkpoint::Layer weights, const LayerOptions& options, std::unique_ptr<Executor> host,
            fourmoe_layer** out) {
  auto layer = std::make_unique<Layer>(std::move(weights), options);
  *out = new fourmoe_layer{std::move(host), std::move(layer)};
}

}  // namespace

extern "C" {

const char* fourmoe_version(void) { return "0.1.0"; }
const char* fourmoe_status_name(fourmoe_status status) { return reason_name(static_cast<Reason>(status)).data(); }
const char* fourmoe_status_text(fourmoe_status status) { return reason_text(static_cast<Reason>(status)).data(); }
const char* fourmoe_last_error(void) { return last_error().c_str(); }

fourmoe_status fourmoe_checkpoint_open(const char* path, fourmoe_checkpoint** checkpoint) {
  return guard([&] {
    require(path != nullptr && checkpoint != nullptr, "path or checkpoint is null");
    *checkpoint = new fourmoe_checkpoint{checkpoint::Checkpoint::open(path)};
    return Status{};
  });
}

void fourmoe_checkpoint_close(fourmoe_checkpoint* checkpoint) { delete checkpoint; }

fourmoe_status fourmoe_checkpoint_layers(const fourmoe_checkpoint* checkpoint, int32_t* layers, int64_t capacity,
                                         int64_t* count) {
  return guard([&] {
    require(checkpoint != nullptr && count != nullptr, "checkpoint or count is null");
    require(capacity >= 0, fmt::format("capacity is {}, expected at least 0", capacity));
    require(layers != nullptr || capacity == 0, "layers is null");
    const std::vector<i32> found = checkpoint->value.layers();
    *count = static_cast<int64_t>(found.size());
    for (i64 i = 0; i < std::min(*count, capacity); ++i) layers[i] = found[i];
    return Status{};
  });
}

fourmoe_status fourmoe_layer_load(const fourmoe_checkpoint* checkpoint, int32_t layer, const fourmoe_options* options,
                                  fourmoe_layer** out) {
  return guard([&] {
    require(checkpoint != nullptr && out != nullptr, "checkpoint or out is null");
    std::unique_ptr<Executor> host;
    const LayerOptions converted = convert(options, &host);
    Executor& executor = converted.executor != nullptr ? *converted.executor : tbb_executor();
    finish(checkpoint->value.load(layer, executor), converted, std::move(host), out);
    return Status{};
  });
}

fourmoe_status fourmoe_layer_create(const fourmoe_layer_desc* desc, const fourmoe_options* options,
                                    fourmoe_layer** out) {
  return guard([&] {
    require(out != nullptr, "out is null");
    check_size("desc", desc);
    std::unique_ptr<Executor> host;
    const LayerOptions converted = convert(options, &host);
    finish(convert(*desc, converted.device), converted, std::move(host), out);
    return Status{};
  });
}

void fourmoe_layer_free(fourmoe_layer* layer) { delete layer; }

fourmoe_status fourmoe_layer_get_info(const fourmoe_layer* layer, fourmoe_layer_info* info) {
  return guard([&] {
    require(layer != nullptr, "layer is null");
    check_size("info", info);
    const Problem& p = layer->value->problem();
    const checkpoint::Layer& weights = layer->value->weights();
    info->hidden = p.hidden;
    info->inter = p.inter;
    info->experts = p.experts;
    info->top_k = p.top_k;
    info->first_expert = p.first_expert;
    info->local_experts = p.local_experts;
    info->encoding = static_cast<int32_t>(p.encoding);
    info->activation = static_cast<int32_t>(p.activation.kind);
    info->precision = static_cast<int32_t>(p.precision);
    info->has_router = weights.router.empty() ? 0 : 1;
    info->has_shared = weights.shared ? 1 : 0;
    info->max_tokens = p.max_tokens;
    info->weight_bytes = 0;
    for (const weights::Expert& e : weights.experts) {
      info->weight_bytes += e.gate.bytes() + e.up.bytes() + e.down.bytes();
    }
    info->packed_bytes = layer->value->packed_bytes();
    info->workspace_bytes = layer->value->workspace_bytes();
    info->device = layer->value->plan().machine.device;
    info->unused = 0;
    return Status{};
  });
}

fourmoe_status fourmoe_layer_run(fourmoe_layer* layer, const fourmoe_call* call, void* workspace,
                                 int64_t workspace_bytes) {
  return guard([&] {
    require(layer != nullptr, "layer is null");
    check_size("call", call);
    LayerCall converted;
    converted.hidden = convert("hidden_states", call->hidden_states);
    converted.hidden_scales = convert("hidden_scales", call->hidden_scales);
    converted.logits = convert("router_logits", call->router_logits);
    converted.ids = convert("topk_ids", call->topk_ids);
    converted.weights = convert("topk_weights", call->topk_weights);
    converted.output = convert("output", call->output);
    converted.picked_ids = call->picked_ids;
    converted.picked_weights = call->picked_weights;
    converted.stream = call->stream;
    return layer->value->run(converted, {static_cast<std::byte*>(workspace), workspace_bytes});
  });
}

fourmoe_status fourmoe_layer_wait(fourmoe_layer* layer, void* stream) {
  return guard([&] {
    require(layer != nullptr, "layer is null");
    return layer->value->wait(stream);
  });
}

fourmoe_status fourmoe_layer_refit(fourmoe_layer* layer, const fourmoe_layer_desc* desc) {
  return guard([&] {
    require(layer != nullptr, "layer is null");
    check_size("desc", desc);
    layer->value->refit(convert(*desc, layer->value->plan().machine.device));
    return Status{};
  });
}

}  // extern "C"
