// Runs the first MoE layer of a checkpoint on random hidden states; the checkpoint's own router chooses the experts.
// Usage: run_layer CHECKPOINT
#include <cmath>
#include <fourmoe/fourmoe.hpp>
#include <iostream>
#include <random>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run_layer CHECKPOINT\n";
    return 2;
  }
  try {
    const fourmoe::Checkpoint checkpoint(argv[1]);
    fourmoe::Layer layer = checkpoint.load(checkpoint.layers().at(0));
    const fourmoe_layer_info info = layer.info();
    std::cout << info.experts << " experts of " << info.hidden << " x " << info.inter << ", top " << info.top_k << "\n";

    const int tokens = 8;
    std::vector<float> hidden(static_cast<std::size_t>(tokens) * info.hidden);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& value : hidden) value = normal(random);

    std::vector<float> output(hidden.size());
    std::vector<int> picked(static_cast<std::size_t>(tokens) * info.top_k);
    fourmoe::Call call;
    call.hidden_states = fourmoe::view(hidden.data(), FOURMOE_F32, tokens, info.hidden);
    call.output = fourmoe::view(output.data(), FOURMOE_F32, tokens, info.hidden);
    call.picked_ids = picked.data();
    layer.run(call);

    for (int token = 0; token < tokens; ++token) {
      std::cout << "token " << token << ": experts";
      for (int pick = 0; pick < info.top_k; ++pick) std::cout << ' ' << picked[token * info.top_k + pick];
      double squares = 0;
      for (int col = 0; col < info.hidden; ++col) squares += std::pow(output[token * info.hidden + col], 2);
      std::cout << ", rms of the output " << std::sqrt(squares / info.hidden) << '\n';
    }
  } catch (const std::exception& error) {
    std::cerr << "run_layer: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
