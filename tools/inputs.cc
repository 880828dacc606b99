#include "inputs.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace fourmoe::tools {
namespace {

const std::vector<u16>& normals() {
  static const std::vector<u16> values = [] {
    std::vector<u16> made((1 << 20) + 7);  // no multiple of a row
    std::mt19937_64 random(3);
    std::normal_distribution<f32> normal;
    for (u16& value : made) value = format::to_bf16(normal(random));
    return made;
  }();
  return values;
}

}  // namespace

Inputs::Inputs(const Problem& problem, i64 tokens, u64 seed)
    : tokens_(tokens),
      hidden_size_(problem.hidden),
      top_k_(problem.top_k),
      hidden_(static_cast<std::size_t>(tokens * problem.hidden)),
      ids_(static_cast<std::size_t>(tokens * problem.top_k)),
      weights_(ids_.size(), 1.0f / static_cast<f32>(problem.top_k)),
      output_(hidden_.size()) {
  std::mt19937_64 random(seed);
  const std::vector<u16>& pool = normals();
  std::size_t from = random() % pool.size();
  for (std::size_t to = 0; to < hidden_.size();) {
    const std::size_t count = std::min(pool.size() - from, hidden_.size() - to);
    std::copy_n(pool.data() + from, count, hidden_.data() + to);
    to += count;
    from = 0;
  }
  std::vector<i32> experts(static_cast<std::size_t>(problem.experts));
  std::iota(experts.begin(), experts.end(), 0);
  for (i64 t = 0; t < tokens; ++t) {
    for (i64 p = 0; p < top_k_; ++p) {  // the beginning of a shuffle
      std::swap(experts[p], experts[p + static_cast<i64>(random() % static_cast<u64>(problem.experts - p))]);
      ids_[static_cast<std::size_t>(t * top_k_ + p)] = experts[p];
    }
  }
}

LayerCall Inputs::call() {
  LayerCall call;
  call.hidden = {hidden_.data(), format::Dtype::bf16, tokens_, hidden_size_, hidden_size_};
  call.ids = {ids_.data(), format::Dtype::i32, tokens_, top_k_, top_k_};
  call.weights = {weights_.data(), format::Dtype::f32, tokens_, top_k_, top_k_};
  call.output = {output_.data(), format::Dtype::bf16, tokens_, hidden_size_, hidden_size_};
  return call;
}

}  // namespace fourmoe::tools
