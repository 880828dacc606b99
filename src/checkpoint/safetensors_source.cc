#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "checkpoint/experts.h"
#include "checkpoint/folder.h"
#include "checkpoint/source.h"
#include "format/validate.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;

constexpr std::array<std::string_view, 3> kNames = {"gate", "up", "down"};

void check_sizes(const Geometry& geometry, i32 layer, std::string_view what) {
  if (geometry.hidden % 16 == 0 && geometry.inter % 16 == 0) return;
  throw Error(Reason::shape_unsupported,
              fmt::format("layer {}: {} of hidden size {} and intermediate size {}; multiples "
                          "of 16 would pass",
                          layer, what, geometry.hidden, geometry.inter));
}

void check_encoding(const ExpertSources& sources, Encoding encoding) {
  if (encoding != Encoding::fp8) return;
  throw Error(Reason::encoding_unsupported, where(sources[1].parts->weight) +
                                                ": experts in FP8 are not read; nvfp4, mxfp4, bf16, f16, f32 would "
                                                "pass");
}

// FP8 with one scale a matrix is read; scales by block or row would be dropped silently if they were not refused.
void check_fp8_scale(const Source& source) {
  const Named scale = source.parts->scale;
  if (scale == nullptr) {
    throw Error(Reason::tensor_missing, fmt::format("{} has no scale: {} is missing", where(source.parts->weight),
                                                    quote(sibling_name(source.parts->weight->first, "weight_scale"))));
  }
  if (scale->second.bytes <= 4) return;
  throw Error(Reason::encoding_unsupported, fmt::format("{}: FP8 scales of shape {} are not read; one scale a matrix "
                                                        "would pass",
                                                        where(scale), shape_text(scale->second.shape)));
}

void check_block_scales(const Source& source, const Form& form, const format::Matrix& matrix,
                        const std::string& whose) {
  const auto bad = format::find_bad_scale(matrix);
  if (!bad) return;
  const bool nan = (bad->byte & 0x7f) == 0x7f;
  throw Error(Reason::scale_invalid,
              fmt::format("{} at offset {}: block scale {:#04x} of {}, row {}, block {} is {}",
                          where(source.parts->scale), scale_offset(source, form, bad->row, bad->block), bad->byte,
                          whose, bad->row, bad->block, nan ? "NaN" : "negative"));
}

// Matrices, checked scales and biases of one expert; globals and input scales come later.
void load_expert(const ExpertSources& sources, const Geometry& geometry, Encoding encoding, const std::string& whose,
                 Owned* owned, weights::Expert* out) {
  const std::array<Form, 3> forms = examine_all(sources, geometry);
  if (forms[1].encoding != encoding) {
    throw Error(Reason::encoding_unsupported,
                fmt::format("{}: {} is {}, the layer's first expert {}", where(sources[1].parts->weight), whose,
                            encoding_name(forms[1].encoding), encoding_name(encoding)));
  }
  const std::array<format::Matrix*, 3> matrices = {&out->gate, &out->up, &out->down};
  const std::array<const f32**, 3> biases = {&out->gate_bias, &out->up_bias, &out->down_bias};
  for (std::size_t p = 0; p < 3; ++p) {
    if (sources[p].parts == nullptr) continue;
    if (encoding == Encoding::fp8) check_fp8_scale(sources[p]);
    *matrices[p] = view(sources[p], forms[p], owned);
    check_block_scales(sources[p], forms[p], *matrices[p], fmt::format("{}'s {}", whose, kNames[p]));
    *biases[p] = read_bias(sources[p], owned);
  }
}

void set_scales(const std::array<ProjectionScales, 3>& scales, const InputScales& inputs, weights::Expert* out) {
  const std::array<format::Matrix*, 3> matrices = {&out->gate, &out->up, &out->down};
  for (std::size_t p = 0; p < 3; ++p) {
    if (scales[p].global.present) matrices[p]->global = scales[p].global.value;
  }
  out->input_scale = inputs.tokens;
  out->inter_scale = inputs.inter;
}

LayerScales read_layer_scales(const LayerTensors& layer, const Geometry& geometry) {
  LayerScales out;
  out.gated = geometry.gated;
  out.experts.resize(static_cast<std::size_t>(geometry.experts));
  for (i32 e = 0; e < geometry.experts; ++e) {
    const ExpertSources sources = find_sources(layer, geometry, e);
    for (std::size_t p = 0; p < 3; ++p) {
      if (sources[p].parts != nullptr) out.experts[static_cast<std::size_t>(e)][p] = read_scales(sources[p]);
    }
  }
  return out;
}

bool has_biases(const ExpertSources& sources) {
  return std::any_of(sources.begin(), sources.end(),
                     [](const Source& source) { return source.parts != nullptr && source.parts->bias != nullptr; });
}

class SafetensorsSource final : public LayerSource {
 public:
  explicit SafetensorsSource(Folder folder)
      : folder_(std::move(folder)),
        layers_(find_layers(folder_.tensors, folder_.config.row.gate_bias_selects, folder_.config.layers)) {
    if (layers_.empty()) {
      throw Error(Reason::family_unknown,
                  fmt::format("{}: none of {} tensors is named like an expert's (...layers.N....experts...); known: {}",
                              folder_.path.string(), folder_.tensors.size(), family_names()));
    }
    if (folder_.config.row.generic) refuse_unknown_routing();
  }

  std::vector<i32> layers() const override {
    std::vector<i32> out;
    for (const LayerTensors& layer : layers_) out.push_back(layer.index);
    return out;
  }

  const TensorMap& tensors() const override { return folder_.tensors; }

  Info inspect() const override {
    const Config& config = folder_.config;
    Info out;
    out.path = folder_.path.string();
    out.family = config.family;
    out.algorithm = config.quantisation.algorithm;
    out.producer = config.quantisation.producer;
    out.files = folder_.files;
    out.tensors = static_cast<i64>(folder_.tensors.size());
    for (const auto& [name, tensor] : folder_.tensors) out.bytes += tensor.bytes;
    for (const LayerTensors& layer : layers_) out.layers.push_back(inspect_layer(layer));
    out.dialect = dialect(out.layers);
    return out;
  }

  Layer load(i32 index, Executor& executor) const override {
    const LayerTensors& layer = find(index);
    if (const auto why = find_unreadable_algorithm(folder_.config.quantisation)) {
      throw Error(Reason::precision_unsupported, fmt::format("{}: {}", folder_.config.file, *why));
    }
    const auto owned = std::make_shared<Owned>();
    Layer out;
    out.owner = owned;
    load_experts(layer, executor, owned.get(), &out);
    load_router(layer, owned.get(), &out);
    if (has_shared(layer) && folder_.config.latent == 0) load_shared(layer, owned.get(), &out);
    add_notes(layer, &out);
    return out;
  }

 private:
  // Plain softmax has no selection bias, and a bias of the router may be one: a model that has one, or a tensor that is
  // not known, routes in another way.
  void refuse_unknown_routing() const {
    for (const LayerTensors& layer : layers_) {
      Named odd = layer.selection_bias != nullptr ? layer.selection_bias : layer.router_bias;
      if (odd == nullptr) odd = find_unknown(folder_.tensors, layer);
      if (odd == nullptr) continue;
      throw Error(Reason::family_unknown,
                  fmt::format("{}: model_type {} is not known and may route with {}; known: {}", folder_.config.file,
                              quote(folder_.config.family), where(odd), family_names()));
    }
  }

  const LayerTensors& find(i32 index) const {
    for (const LayerTensors& layer : layers_) {
      if (layer.index == index) return layer;
    }
    refuse_layer(folder_.path.string(), index, layers());
  }

  bool routable(const LayerTensors& layer) const {
    return layer.router != nullptr && layer.hash_table == nullptr && folder_.config.latent == 0;
  }

  LayerInfo inspect_layer(const LayerTensors& layer) const {
    check_experts(layer, folder_.config);
    const Geometry geometry = geometry_of(folder_.config);
    const ExpertSources sources = find_sources(layer, geometry, 0);
    const std::array<Form, 3> forms = examine_all(sources, geometry);
    LayerInfo out;
    out.index = layer.index;
    out.prefix = layer.base;
    out.layout = layout_name(sources, forms);
    out.problem = make_problem(folder_.config, forms[1].encoding);
    out.router = routable(layer);
    out.biases = has_biases(sources);
    out.bytes = expert_bytes(layer);
    if (forms[1].encoding == Encoding::nvfp4) out.oddities = find_oddities(read_layer_scales(layer, geometry));
    if (has_shared(layer)) out.shared = inspect_shared(layer, geometry);
    return out;
  }

  SharedInfo inspect_shared(const LayerTensors& layer, const Geometry& geometry) const {
    const ExpertSources sources = find_shared_sources(layer, geometry_on_hidden(geometry));
    SharedInfo out;
    out.inter = sources[1].rows;
    out.encoding = examine_all(sources, geometry)[1].encoding;
    out.gated = layer.shared_gate != nullptr;
    return out;
  }

  // The shared expert works on the model's width even where the routed ones work on a latent one.
  Geometry geometry_on_hidden(Geometry geometry) const {
    geometry.hidden = folder_.config.hidden;
    return geometry;
  }

  std::string dialect(const std::vector<LayerInfo>& layers) const {
    const std::string& method = folder_.config.quantisation.method;
    if (method.starts_with("modelopt")) return "modelopt";
    if (method == "compressed-tensors" || method == "mxfp4") return method;
    const Encoding encoding = layers[0].problem.encoding;
    const Source up = find_sources(layers_[0], geometry_of(folder_.config), 0)[1];
    if (encoding == Encoding::nvfp4) return up.parts->global_divides ? "compressed-tensors" : "modelopt";
    if (encoding == Encoding::mxfp4) return "mxfp4";
    return encoding == Encoding::fp8 ? "fp8" : "dense";
  }

  void load_experts(const LayerTensors& layer, Executor& executor, Owned* owned, Layer* out) const {
    const Geometry geometry = geometry_of(folder_.config);
    check_sizes(geometry, layer.index, "experts");
    check_experts(layer, folder_.config);
    const ExpertSources first = find_sources(layer, geometry, 0);
    const Encoding encoding = examine_all(first, geometry)[1].encoding;
    check_encoding(first, encoding);
    out->problem = make_problem(folder_.config, encoding);
    const LayerScales scales = read_layer_scales(layer, geometry);
    check_globals(scales);
    const std::vector<InputScales> inputs = resolve_inputs(scales);
    out->experts.resize(static_cast<std::size_t>(geometry.experts));
    run_all(executor, geometry.experts, [&](i64 index) {
      const std::size_t e = static_cast<std::size_t>(index);
      const ExpertSources sources = find_sources(layer, geometry, static_cast<i32>(index));
      load_expert(sources, geometry, encoding, fmt::format("expert {}", index), owned, &out->experts[e]);
      set_scales(scales.experts[e], inputs[e], &out->experts[e]);
    });
    if (encoding == Encoding::nvfp4) {
      out->notes = describe(find_oddities(scales), geometry.experts, geometry.gated);
    }
  }

  void load_router(const LayerTensors& layer, Owned* owned, Layer* out) const {
    const i64 experts = folder_.config.experts;
    if (layer.selection_bias != nullptr) {
      out->selection_bias = read_vector(layer.selection_bias, experts);
      check_finite(out->selection_bias, where(layer.selection_bias));
    }
    out->picked_by_token = layer.hash_table != nullptr;
    if (!routable(layer)) return;
    out->router = read_dense(layer.router, experts, folder_.config.hidden, owned);
    if (layer.router_bias == nullptr) return;
    out->router_bias = read_vector(layer.router_bias, experts);
    check_finite(out->router_bias, where(layer.router_bias));
  }

  void load_shared(const LayerTensors& layer, Owned* owned, Layer* out) const {
    Geometry geometry = geometry_on_hidden(geometry_of(folder_.config));
    const ExpertSources sources = find_shared_sources(layer, geometry);
    geometry.inter = sources[1].rows;
    check_sizes(geometry, layer.index, "a shared expert");
    const Encoding encoding = examine_all(sources, geometry)[1].encoding;
    Layer::Shared shared;
    shared.problem = make_shared_problem(folder_.config, encoding, geometry.inter);
    load_expert(sources, geometry, encoding, "the shared expert", owned, &shared.expert);
    LayerScales scales;
    scales.gated = geometry.gated;
    scales.experts.resize(1);
    for (std::size_t p = 0; p < 3; ++p) {
      if (sources[p].parts != nullptr) scales.experts[0][p] = read_scales(sources[p]);
    }
    check_globals(scales);
    set_scales(scales.experts[0], resolve_inputs(scales)[0], &shared.expert);
    if (layer.shared_gate != nullptr) shared.gate = read_dense(layer.shared_gate, 1, folder_.config.hidden, owned);
    out->shared = std::move(shared);
  }

  void add_notes(const LayerTensors& layer, Layer* out) const {
    if (layer.extra)
      out->notes.push_back(fmt::format("{} is a prediction head, numbered {} here", layer.base, layer.index));
    if (folder_.config.latent > 0) {
      out->notes.push_back(
          fmt::format("experts work on a latent of {} of {} columns: give latent tokens and logits; "
                      "router and shared expert are left out",
                      folder_.config.latent, folder_.config.hidden));
    }
    if (layer.hash_table != nullptr) out->notes.push_back("picks come from a table of token ids: give ids and weights");
    if (layer.router == nullptr) out->notes.push_back("the checkpoint has no router for this layer");
  }

  Folder folder_;
  std::vector<LayerTensors> layers_;
};

}  // namespace

std::unique_ptr<LayerSource> open_safetensors(const std::filesystem::path& path) {
  return std::make_unique<SafetensorsSource>(open_folder(path));
}

}  // namespace fourmoe::checkpoint
