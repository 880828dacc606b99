// Experts from memory, in C++: weights that a host program already holds, picks that its own router made.
//
//   c++ -std=c++20 experts.cc $(pkg-config --cflags --libs fourmoe) -o experts && ./experts
#include <cstdint>
#include <cstdio>
#include <fourmoe/fourmoe.hpp>
#include <vector>

namespace {

constexpr int kHidden = 64, kInter = 32, kExperts = 8, kTopK = 2, kTokens = 3;

// One projection: codes and block scales as NVFP4 stores them, and its global scale.
struct Projection {
  Projection(int rows, int cols, std::uint8_t seed, float global) : codes(rows * cols / 2), scales(rows * cols / 16) {
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(37 * i + seed);
    for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<std::uint8_t>(0x30 + i % 8);
    matrix = {codes.data(), scales.data(), 0, 0, global, 0};
  }
  std::vector<std::uint8_t> codes, scales;
  fourmoe_matrix matrix{};
};

}  // namespace

int main() try {
  std::vector<Projection> memory;
  memory.reserve(3 * kExperts);
  std::vector<fourmoe_expert> experts(kExperts);
  for (int e = 0; e < kExperts; ++e) {
    const auto seed = static_cast<std::uint8_t>(e);
    experts[e].gate = memory.emplace_back(kInter, kHidden, seed, 0.02f).matrix;
    experts[e].up = memory.emplace_back(kInter, kHidden, seed + 91, 0.03f).matrix;  // its own global scale
    experts[e].down = memory.emplace_back(kHidden, kInter, seed + 180, 0.05f).matrix;
  }

  fourmoe_layer_desc desc{};
  desc.struct_size = sizeof desc;
  desc.hidden = kHidden;
  desc.inter = kInter;
  desc.experts = kExperts;
  desc.top_k = kTopK;
  desc.expert_table = experts.data();
  fourmoe::Layer layer = fourmoe::Layer::create(desc);

  std::vector<float> hidden(kTokens * kHidden, 0.5f), output(kTokens * kHidden);
  std::vector<std::int32_t> ids = {0, 5, 7, -1, 3, 3};  // -1: no pick; the same expert twice is legal
  std::vector<float> weights = {0.6f, 0.4f, 1.0f, 0.0f, 0.5f, 0.5f};
  fourmoe::Call call;
  call.hidden_states = fourmoe::view(hidden.data(), FOURMOE_F32, kTokens, kHidden);
  call.topk_ids = fourmoe::view(ids.data(), FOURMOE_I32, kTokens, kTopK);
  call.topk_weights = fourmoe::view(weights.data(), FOURMOE_F32, kTokens, kTopK);
  call.output = fourmoe::view(output.data(), FOURMOE_F32, kTokens, kHidden);
  layer.run(call);

  for (int t = 0; t < kTokens; ++t)
    std::printf("token %d: %g %g ...\n", t, output[t * kHidden], output[t * kHidden + 1]);
  return 0;
} catch (const fourmoe::Error& error) {
  std::fprintf(stderr, "%s: %s\n", error.name().c_str(), error.what());
  return 1;
}
