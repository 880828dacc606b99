#include "checkpoint/experts.h"

#include <fmt/format.h>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

constexpr std::array<Projection, 3> kAll = {Projection::gate, Projection::up, Projection::down};

// A weight of `which`, its own or that of fused gate and up; null when there is neither.
Named weight_of(const ProjectionParts& parts, Projection which) {
  if (part(parts, which).weight != nullptr) return part(parts, which).weight;
  return which == Projection::down ? nullptr : part(parts, Projection::gate_up).weight;
}

Source locate(const ProjectionParts& parts, Projection which, const Geometry& geometry) {
  const bool down = which == Projection::down;
  const bool fused = !down && part(parts, Projection::gate_up).weight != nullptr;
  Source out;
  out.parts = &part(parts, fused ? Projection::gate_up : which);
  out.halves = fused ? 2 : 1;
  out.half = fused && which == Projection::up ? 1 : 0;
  out.interleaved = fused && geometry.interleaved;
  out.rows = down ? geometry.hidden : geometry.inter;
  out.cols = down ? geometry.inter : geometry.hidden;
  return out;
}

void check_weights(const ProjectionParts& parts, const LayerTensors& layer, const Config& config, i32 expert) {
  const bool gated = config.activation.gated();
  for (const Projection which : kAll) {
    const bool needed = gated || which != Projection::gate;
    if (needed && weight_of(parts, which) == nullptr) {
      throw Error(Reason::tensor_missing, fmt::format("layer {}: tensor {} is missing", layer.index,
                                                      quote(missing_weight_name(layer, expert, which))));
    }
    if (!needed && weight_of(parts, which) != nullptr) {
      throw Error(Reason::activation_unsupported,
                  fmt::format("{}: {} has no gate, but the tensor is there", where(weight_of(parts, which)),
                              activation_name(config.activation.kind)));
    }
    if (part(parts, which).weight != nullptr && part(parts, Projection::gate_up).weight != nullptr &&
        which != Projection::down) {
      throw Error(Reason::tensor_mismatch,
                  fmt::format("{} and {} hold the same weights", where(part(parts, which).weight),
                              where(part(parts, Projection::gate_up).weight)));
    }
  }
}

void check_count(const LayerTensors& layer, const Config& config) {
  const i32 last = layer.experts.rbegin()->first;
  i32 expected = 0;
  for (const auto& [expert, parts] : layer.experts) {
    if (expert != expected) break;
    ++expected;
  }
  const i32 found = static_cast<i32>(layer.experts.size());
  if (expected == last + 1 && found == config.experts) return;
  const std::string gap = expected <= last ? fmt::format(", without expert {}", expected) : std::string();
  const bool hole = expected <= last && last < config.experts;
  throw Error(
      hole ? Reason::tensor_missing : Reason::tensor_mismatch,
      fmt::format("layer {}: tensors under {} are of {} experts (up to number {}{}), \"{}\" of {} says {}", layer.index,
                  quote(layer.base + ".experts"), found, last, gap, config.experts_key, config.file, config.experts));
}

// Which orientation to take where both fit: that of a projection in which one alone fits, since a checkpoint stores all
// in one; else the family's.
bool find_orientation(const ExpertSources& sources, const Geometry& geometry) {
  for (const Source& source : sources) {
    if (source.parts == nullptr || source.experts == 0) continue;
    const bool transposed = examine(source, geometry.prefer_transposed).transposed;
    if (transposed == examine(source, !geometry.prefer_transposed).transposed) return transposed;
  }
  return geometry.prefer_transposed;
}

}  // namespace

Geometry geometry_of(const Config& config) {
  Geometry out;
  out.hidden = config.latent > 0 ? config.latent : config.hidden;
  out.inter = config.inter;
  out.experts = config.experts;
  out.gated = config.activation.gated();
  out.interleaved = config.row.interleaved;
  out.prefer_transposed = config.row.transposed;
  return out;
}

void check_experts(const LayerTensors& layer, const Config& config) {
  if (layer.stacked()) return check_weights(layer.stacks, layer, config, 0);
  for (const Parts& parts : layer.stacks) {
    if (parts.weight == nullptr) continue;
    throw Error(Reason::tensor_mismatch,
                fmt::format("{}: a stack stands beside the experts' own tensors", where(parts.weight)));
  }
  check_count(layer, config);
  for (const auto& [expert, parts] : layer.experts) check_weights(parts, layer, config, expert);
}

ExpertSources find_sources(const LayerTensors& layer, const Geometry& geometry, i32 expert) {
  const ProjectionParts& parts = layer.stacked() ? layer.stacks : layer.experts.at(expert);
  ExpertSources out;
  for (std::size_t p = geometry.gated ? 0 : 1; p < 3; ++p) {
    out[p] = locate(parts, kAll[p], geometry);
    if (!layer.stacked()) continue;
    out[p].experts = geometry.experts;
    out[p].expert = expert;
  }
  return out;
}

bool has_shared(const LayerTensors& layer) {
  for (const Parts& parts : layer.shared) {
    if (parts.weight != nullptr) return true;
  }
  return false;
}

ExpertSources find_shared_sources(const LayerTensors& layer, const Geometry& geometry) {
  Geometry own = geometry;
  own.interleaved = false;
  ExpertSources out;
  for (std::size_t p = geometry.gated ? 0 : 1; p < 3; ++p) {
    if (weight_of(layer.shared, kAll[p]) == nullptr) {
      throw Error(Reason::tensor_missing,
                  fmt::format("layer {}: the shared expert under {} lacks its {} weight", layer.index,
                              quote(layer.base), std::array{"gate", "up", "down"}[p]));
    }
  }
  const Named up = weight_of(layer.shared, Projection::up);
  const i64 rows = up->second.shape.empty() ? 0 : up->second.shape[0];
  const bool fused = part(layer.shared, Projection::up).weight == nullptr;
  if (rows <= 0 || rows > (i64{1} << 24) || (fused && rows % 2 != 0)) {
    throw Error(Reason::tensor_mismatch,
                fmt::format("{}: shape {} gives no intermediate size", where(up), shape_text(up->second.shape)));
  }
  own.inter = static_cast<i32>(fused ? rows / 2 : rows);
  for (std::size_t p = geometry.gated ? 0 : 1; p < 3; ++p) out[p] = locate(layer.shared, kAll[p], own);
  return out;
}

std::array<Form, 3> examine_all(const ExpertSources& sources, const Geometry& geometry) {
  const bool prefer_transposed = find_orientation(sources, geometry);
  std::array<Form, 3> forms;
  for (std::size_t p = 0; p < 3; ++p) {
    if (sources[p].parts != nullptr) forms[p] = examine(sources[p], prefer_transposed);
  }
  for (std::size_t p = 0; p < 3; ++p) {
    if (sources[p].parts == nullptr) forms[p] = forms[1];
    if (forms[p].encoding == forms[1].encoding) continue;
    throw Error(Reason::encoding_unsupported,
                fmt::format("{} is {} but {} is {}; one encoding for all projections would pass",
                            where(sources[p].parts->weight), encoding_name(forms[p].encoding),
                            where(sources[1].parts->weight), encoding_name(forms[1].encoding)));
  }
  return forms;
}

std::string layout_name(const ExpertSources& sources, const std::array<Form, 3>& forms) {
  if (sources[1].experts == 0) return "per-expert";
  if (forms[1].transposed) return "transposed";
  return sources[1].interleaved ? "interleaved" : "stacked";
}

i64 expert_bytes(const LayerTensors& layer) {
  i64 bytes = 0;
  const auto add = [&bytes](const ProjectionParts& all) {
    for (const Parts& parts : all) {
      for (const Named named : {parts.weight, parts.scale, parts.global, parts.input, parts.bias}) {
        if (named != nullptr) bytes += named->second.bytes;
      }
    }
  };
  add(layer.stacks);
  for (const auto& [expert, parts] : layer.experts) add(parts);
  return bytes;
}

}  // namespace fourmoe::checkpoint
