#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <utility>

#include "checkpoint/gguf_config.h"
#include "checkpoint/source.h"
#include "checkpoint/views.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;
using format::Matrix;

using Entry = const std::pair<const std::string, GgufTensor>*;  // name and tensor; null for none

constexpr std::array<std::string_view, 3> kNames = {"gate", "up", "down"};

std::optional<Encoding> encoding_of(u32 type) {
  switch (type) {
    case kGgmlF32: return Encoding::f32;
    case kGgmlF16: return Encoding::f16;
    case kGgmlBf16: return Encoding::bf16;
    case kGgmlMxfp4: return Encoding::mxfp4;
    case kGgmlNvfp4: return Encoding::nvfp4;
    default: return std::nullopt;
  }
}

// The tensors of one projection; of a stack with a leading dimension of experts, or of one shared expert.
struct Stack {
  Entry weight = nullptr;
  Entry scale = nullptr;
  Entry input = nullptr;
  Entry bias = nullptr;
  i64 experts = 0;  // 0: of one expert
  i32 rows = 0;
  i32 cols = 0;
};

using Stacks = std::array<Stack, 3>;  // gate (absent when not gated), up, down

// Layer number of "blk.N.ffn_up_exps.weight"; nothing for other names.
std::optional<i32> layer_of(std::string_view name) {
  constexpr std::string_view kBegin = "blk.", kEnd = ".ffn_up_exps.weight";
  if (!name.starts_with(kBegin) || !name.ends_with(kEnd) || name.size() <= kBegin.size() + kEnd.size()) return {};
  const char* first = name.data() + kBegin.size();
  const char* last = name.data() + name.size() - kEnd.size();
  i32 number = -1;
  const auto [end, error] = std::from_chars(first, last, number);
  return error == std::errc() && end == last && number >= 0 ? std::optional(number) : std::nullopt;
}

class GgufSource final : public LayerSource {
 public:
  explicit GgufSource(std::shared_ptr<const MappedFile> file)
      : file_(std::move(file)),
        gguf_(parse_gguf({file_->data(), static_cast<std::size_t>(file_->size())}, file_->path().string())),
        config_(read_gguf_config(gguf_, file_->path().string())) {
    for (const auto& [name, tensor] : gguf_.tensors) {
      if (const auto number = layer_of(name)) layers_.push_back(*number);
    }
    std::sort(layers_.begin(), layers_.end());
    if (layers_.empty()) throw Error(Reason::family_unknown, path() + ": no tensor is named blk.N.ffn_up_exps.weight");
  }

  std::vector<i32> layers() const override { return layers_; }
  const TensorMap& tensors() const override { return no_tensors_; }

  Info inspect() const override {
    Info out;
    out.path = path();
    out.family = config_.family;
    out.dialect = "gguf";
    out.algorithm = ggml_type_name(find_stacks(layers_[0])[1].weight->second.type);
    out.files = 1;
    out.tensors = static_cast<i64>(gguf_.tensors.size());
    for (const auto& [name, tensor] : gguf_.tensors) out.bytes += tensor.bytes;
    for (const i32 layer : layers_) out.layers.push_back(inspect_layer(layer));
    return out;
  }

  Layer load(i32 layer, Executor& executor) const override {
    if (std::find(layers_.begin(), layers_.end(), layer) == layers_.end()) refuse_layer(path(), layer, layers_);
    const auto owned = std::make_shared<Owned>();
    owned->keep(file_);
    Layer out;
    out.owner = owned;
    load_experts(layer, executor, owned.get(), &out);
    load_router(layer, owned.get(), &out);
    if (find(layer, "ffn_up_shexp.weight") != nullptr && config_.latent == 0) {
      load_shared(layer, executor, owned.get(), &out);
    }
    if (config_.latent > 0) out.notes.push_back("experts work on a latent: give latent tokens and logits");
    if (out.router.empty()) out.notes.push_back("the checkpoint has no router for this layer");
    return out;
  }

 private:
  std::string path() const { return file_->path().string(); }

  std::string where(Entry named) const {
    return fmt::format("{}: tensor {} at offset {}", file_->name(), quote(named->first), named->second.offset);
  }

  static std::string name_of(i32 layer, std::string_view rest) { return fmt::format("blk.{}.{}", layer, rest); }

  Entry find(i32 layer, std::string_view rest) const {
    const auto found = gguf_.tensors.find(name_of(layer, rest));
    return found == gguf_.tensors.end() ? nullptr : &*found;
  }

  i32 width() const { return config_.latent > 0 ? config_.latent : config_.hidden; }

  Stack find_stack(i32 layer, std::size_t projection, std::string_view suffix, i64 experts, i32 inter) const {
    const std::string stem = fmt::format("ffn_{}_{}", kNames[projection], suffix);
    Stack out;
    out.weight = find(layer, stem + ".weight");
    if (out.weight == nullptr) {
      throw Error(Reason::tensor_missing,
                  fmt::format("{}: tensor {} is missing", path(), quote(name_of(layer, stem + ".weight"))));
    }
    out.scale = find(layer, stem + ".scale");
    out.input = find(layer, stem + ".input_scale");
    out.bias = find(layer, stem + ".bias");
    out.experts = experts;
    out.rows = projection == 2 ? width() : inter;
    out.cols = projection == 2 ? inter : width();
    return out;
  }

  Stacks find_stacks(i32 layer) const {
    Stacks out;
    for (std::size_t p = config_.activation.gated() ? 0 : 1; p < 3; ++p) {
      out[p] = find_stack(layer, p, "exps", config_.experts, config_.inter);
    }
    return out;
  }

  // One encoding of all projections, after their shapes were checked.
  Encoding check_stacks(const Stacks& stacks) const {
    for (const Stack& stack : stacks) {
      if (stack.weight == nullptr) continue;
      check_shape(stack.weight, stack, {stack.rows, stack.cols});
      const auto encoding = encoding_of(stack.weight->second.type);
      if (!encoding || encoding != encoding_of(stacks[1].weight->second.type)) {
        throw Error(Reason::encoding_unsupported,
                    fmt::format("{} is {}; NVFP4, MXFP4, BF16, F16 or F32 for all projections would pass",
                                where(stack.weight), ggml_type_name(stack.weight->second.type)));
      }
    }
    return *encoding_of(stacks[1].weight->second.type);
  }

  void check_shape(Entry named, const Stack& stack, std::vector<i64> expected) const {
    if (stack.experts > 0) expected.insert(expected.begin(), stack.experts);
    if (named->second.shape == expected) return;
    throw Error(Reason::tensor_mismatch,
                fmt::format("{}: shape {} was found, {} was expected (outermost first)", where(named),
                            shape_text(named->second.shape), shape_text(expected)));
  }

  void check_f32(Entry named) const {
    if (named->second.type == kGgmlF32) return;
    throw Error(Reason::tensor_mismatch,
                fmt::format("{} is {}; F32 was expected", where(named), ggml_type_name(named->second.type)));
  }

  std::vector<f32> read_vector(Entry named, const std::vector<i64>& expected) const {
    check_f32(named);
    if (named->second.shape != expected) {
      throw Error(Reason::tensor_mismatch, fmt::format("{}: shape {} was found, {} was expected", where(named),
                                                       shape_text(named->second.shape), shape_text(expected)));
    }
    std::vector<f32> out(static_cast<std::size_t>(named->second.bytes / 4));
    file_->read(named->second.offset, named->second.bytes, out.data());
    return out;
  }

  LayerScales read_scales(const Stacks& stacks) const {
    LayerScales out;
    out.gated = stacks[0].weight != nullptr;
    const i64 experts = std::max<i64>(stacks[1].experts, 1);
    out.experts.resize(static_cast<std::size_t>(experts));
    for (std::size_t p = 0; p < 3; ++p) {
      for (const Entry named : {stacks[p].scale, stacks[p].input}) {
        if (named == nullptr) continue;
        const std::vector<f32> values = read_vector(named, {experts});
        for (std::size_t e = 0; e < values.size(); ++e) {
          ProjectionScales& scales = out.experts[e][p];
          Scalar& scalar = named == stacks[p].scale ? scales.global : scales.input;
          scalar = {values[e], true, {file_->name(), named->first, named->second.offset + 4 * static_cast<i64>(e)}};
        }
      }
    }
    return out;
  }

  LayerInfo inspect_layer(i32 layer) const {
    const Stacks stacks = find_stacks(layer);
    LayerInfo out;
    out.index = layer;
    out.prefix = fmt::format("blk.{}", layer);
    out.layout = "gguf";
    out.problem = make_problem(config_, check_stacks(stacks));
    out.router = find(layer, "ffn_gate_inp.weight") != nullptr && config_.latent == 0;
    for (const Stack& stack : stacks) {
      out.biases = out.biases || stack.bias != nullptr;
      for (const Entry named : {stack.weight, stack.scale, stack.input, stack.bias}) {
        if (named != nullptr) out.bytes += named->second.bytes;
      }
    }
    if (out.problem.encoding == Encoding::nvfp4) out.oddities = find_oddities(read_scales(stacks));
    if (find(layer, "ffn_up_shexp.weight") != nullptr) out.shared = inspect_shared(layer);
    return out;
  }

  SharedInfo inspect_shared(i32 layer) const {
    const Stacks stacks = find_shared(layer);
    return {stacks[1].rows, check_stacks(stacks), find(layer, "ffn_gate_inp_shexp.weight") != nullptr};
  }

  Stacks find_shared(i32 layer) const {
    const GgufTensor& up = find(layer, "ffn_up_shexp.weight")->second;
    const i64 inter = up.shape[0];
    if (up.shape.size() != 2 || inter > (i64{1} << 24)) {
      throw Error(Reason::tensor_mismatch,
                  fmt::format("{}: shape {} gives no intermediate size", where(find(layer, "ffn_up_shexp.weight")),
                              shape_text(up.shape)));
    }
    Stacks out;
    for (std::size_t p = config_.activation.gated() ? 0 : 1; p < 3; ++p) {
      out[p] = find_stack(layer, p, "shexp", 0, static_cast<i32>(inter));
    }
    return out;
  }

  Matrix view(const Stack& stack, i64 expert, Encoding encoding, Owned* owned) const {
    Matrix out;
    out.rows = stack.rows;
    out.cols = stack.cols;
    out.encoding = encoding;
    const i64 row_bytes = stack.weight->second.bytes / std::max<i64>(stack.experts, 1) / stack.rows;
    const i64 offset = stack.weight->second.offset + expert * stack.rows * row_bytes;
    out.data = file_->data() + offset;
    out.data_stride = row_bytes;
    if (format::is_fp4(encoding)) unpack(stack, expert, offset, row_bytes, owned, &out);
    return out;
  }

  void unpack(const Stack& stack, i64 expert, i64 offset, i64 row_bytes, Owned* owned, Matrix* out) const {
    const bool nvfp4 = out->encoding == Encoding::nvfp4;
    const i64 blocks = stack.cols / format::block_of(out->encoding);
    u8* codes = owned->take_bytes(i64{stack.rows} * stack.cols / 2);
    u8* scales = owned->take_bytes(stack.rows * blocks);
    for (i64 row = 0; row < stack.rows; ++row) {
      const u8* in = file_->data() + offset + row * row_bytes;
      const auto unpack_row = nvfp4 ? unpack_nvfp4_row : unpack_mxfp4_row;
      const i64 bad = unpack_row(in, stack.cols, codes + row * stack.cols / 2, scales + row * blocks);
      if (bad < 0) continue;
      throw Error(Reason::scale_invalid,
                  fmt::format("{}: block scale {:#04x} of expert {}, row {}, block {} is {}", where(stack.weight),
                              scales[row * blocks + bad], expert, row, bad, nvfp4 ? "negative" : "NaN"));
    }
    out->data = codes;
    out->data_stride = stack.cols / 2;
    out->scales = scales;
    out->scales_stride = blocks;
  }

  const f32* read_bias(const Stack& stack, i64 expert, Owned* owned) const {
    if (stack.bias == nullptr) return nullptr;
    check_f32(stack.bias);
    check_shape(stack.bias, stack, {stack.rows});
    f32* out = owned->take_floats(stack.rows);
    std::memcpy(out, file_->data() + stack.bias->second.offset + expert * stack.rows * 4,
                static_cast<std::size_t>(stack.rows) * 4);
    return out;
  }

  std::vector<weights::Expert> load_all(const Stacks& stacks, Executor& executor, Owned* owned,
                                        std::vector<std::string>* notes) const {
    const Encoding encoding = check_stacks(stacks);
    const LayerScales scales = read_scales(stacks);
    check_globals(scales);
    const std::vector<InputScales> inputs = resolve_inputs(scales);
    std::vector<weights::Expert> out(scales.experts.size());
    run_all(executor, static_cast<i64>(out.size()), [&](i64 index) {
      const std::size_t e = static_cast<std::size_t>(index);
      const std::array<Matrix*, 3> matrices = {&out[e].gate, &out[e].up, &out[e].down};
      const std::array<const f32**, 3> biases = {&out[e].gate_bias, &out[e].up_bias, &out[e].down_bias};
      for (std::size_t p = 0; p < 3; ++p) {
        if (stacks[p].weight == nullptr) continue;
        *matrices[p] = view(stacks[p], index, encoding, owned);
        *biases[p] = read_bias(stacks[p], index, owned);
        if (scales.experts[e][p].global.present) matrices[p]->global = scales.experts[e][p].global.value;
      }
      out[e].input_scale = inputs[e].tokens;
      out[e].inter_scale = inputs[e].inter;
    });
    if (notes != nullptr && encoding == Encoding::nvfp4) {
      *notes = describe(find_oddities(scales), static_cast<i32>(out.size()), scales.gated);
    }
    return out;
  }

  void load_experts(i32 layer, Executor& executor, Owned* owned, Layer* out) const {
    const Stacks stacks = find_stacks(layer);
    out->problem = make_problem(config_, check_stacks(stacks));
    check_sizes(layer, out->problem);
    out->experts = load_all(stacks, executor, owned, &out->notes);
  }

  void check_sizes(i32 layer, const Problem& problem) const {
    if (problem.hidden % 16 == 0 && problem.inter % 16 == 0) return;
    throw Error(Reason::shape_unsupported,
                fmt::format("{}: layer {}: hidden size {} and intermediate size {}; multiples of 16 would pass", path(),
                            layer, problem.hidden, problem.inter));
  }

  Matrix read_dense(Entry named, i64 rows, i64 cols, Owned* owned) const {
    const auto encoding = encoding_of(named->second.type);
    const bool flat = rows == 1 && named->second.shape == std::vector<i64>{cols};
    if (!encoding || format::is_fp4(*encoding) || (!flat && named->second.shape != std::vector<i64>{rows, cols})) {
      throw Error(
          Reason::tensor_mismatch,
          fmt::format("{}: {} of shape {} was found, F32, F16 or BF16 of shape {} was expected", where(named),
                      ggml_type_name(named->second.type), shape_text(named->second.shape), shape_text({rows, cols})));
    }
    Matrix out;
    out.encoding = *encoding;
    out.data = file_->data() + named->second.offset;
    out.rows = static_cast<i32>(rows);
    out.cols = static_cast<i32>(cols);
    out.data_stride = format::row_bytes(*encoding, cols);
    return copy_dense(out, where(named), owned);
  }

  void load_router(i32 layer, Owned* owned, Layer* out) const {
    for (const std::string_view name : {"exp_probs_b.bias", "exp_probs_b"}) {
      const Entry bias = find(layer, name);
      if (bias == nullptr) continue;
      out->selection_bias = read_vector(bias, {config_.experts});
      check_finite(out->selection_bias, where(bias));
    }
    const Entry router = find(layer, "ffn_gate_inp.weight");
    if (router == nullptr || config_.latent > 0) return;
    out->router = read_dense(router, config_.experts, config_.hidden, owned);
    if (const Entry bias = find(layer, "ffn_gate_inp.bias")) {
      out->router_bias = read_vector(bias, {config_.experts});
      check_finite(out->router_bias, where(bias));
    }
  }

  void load_shared(i32 layer, Executor& executor, Owned* owned, Layer* out) const {
    const Stacks stacks = find_shared(layer);
    Layer::Shared shared;
    shared.problem = make_shared_problem(config_, check_stacks(stacks), stacks[1].rows);
    check_sizes(layer, shared.problem);
    shared.expert = load_all(stacks, executor, owned, nullptr).at(0);
    const Entry gate = find(layer, "ffn_gate_inp_shexp.weight");
    if (gate != nullptr) shared.gate = read_dense(gate, 1, config_.hidden, owned);
    out->shared = std::move(shared);
  }

  std::shared_ptr<const MappedFile> file_;
  Gguf gguf_;
  Config config_;
  std::vector<i32> layers_;
  TensorMap no_tensors_;
};

}  // namespace

std::unique_ptr<LayerSource> open_gguf(const std::filesystem::path& path) {
  return std::make_unique<GgufSource>(MappedFile::open(path));
}

}  // namespace fourmoe::checkpoint
