// Times a SwiGLU MoE layer on ggml's CPU backend: gate, up, SwiGLU, down, routing weights, sum over the picks.
//
//   ggml_moe TYPE TOKENS[,TOKENS...] [--repack] [--seconds S] [--threads N] [--shape H,I,E,k]
//
// Prints a JSON object a line: {"type", "repacked", "tokens", "median_us", "p10_us", "p90_us", "runs", "bytes"}. Layers
// take turns until at least 1 GiB of other weights was read, and every run draws new picks, as in fourmoe bench.
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string type = "nvfp4";
  std::vector<int> tokens = {1, 16, 128, 512};
  bool repack = false;
  double seconds = 1.0;
  int threads = 2;
  int hidden = 2048, inter = 768, experts = 128, top_k = 8;
};

[[noreturn]] void fail(const std::string& words) {
  std::fprintf(stderr, "ggml_moe: %s\n", words.c_str());
  std::exit(1);
}

std::vector<int> numbers(const char* text) {
  std::vector<int> found;
  for (const char* at = text; *at != '\0';) {
    char* end = nullptr;
    found.push_back(static_cast<int>(std::strtol(at, &end, 10)));
    if (end == at) fail(std::string("not numbers: ") + text);
    at = *end == ',' ? end + 1 : end;
  }
  return found;
}

Options parse(int argc, char** argv) {
  Options options;
  if (argc > 1) options.type = argv[1];
  if (argc > 2) options.tokens = numbers(argv[2]);
  for (int i = 3; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--repack") options.repack = true;
    else if (word == "--seconds" && i + 1 < argc) options.seconds = std::atof(argv[++i]);
    else if (word == "--threads" && i + 1 < argc) options.threads = std::atoi(argv[++i]);
    else if (word == "--shape" && i + 1 < argc) {
      const std::vector<int> shape = numbers(argv[++i]);
      if (shape.size() != 4) fail("--shape needs H,I,E,k");
      options.hidden = shape[0], options.inter = shape[1], options.experts = shape[2], options.top_k = shape[3];
    } else fail("unknown argument " + word);
  }
  return options;
}

ggml_type type_named(const std::string& name) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const char* found = ggml_type_name(static_cast<ggml_type>(t));
    if (found != nullptr && name == found) return static_cast<ggml_type>(t);
  }
  fail("this ggml has no type " + name);
}

// The CPU's buffer that lays 4-bit weights out anew when they are set, where it has one.
ggml_backend_buffer_type_t repack_buffer() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (ggml_backend_buffer_type_t* type = get != nullptr ? get(device) : nullptr; type != nullptr && *type; ++type) {
    if (std::string(ggml_backend_buft_name(*type)).find("REPACK") != std::string::npos) return *type;
  }
  fail("this ggml repacks nothing");
}

// Rows quantised by ggml itself from normal numbers; a few serve all rows.
std::vector<char> quantised(ggml_type type, int rows, int cols, std::mt19937* random) {
  constexpr int kOwnRows = 64;
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> values(static_cast<size_t>(kOwnRows) * cols);
  for (float& value : values) value = normal(*random);
  const size_t row = ggml_row_size(type, cols);
  const std::vector<float> importance(static_cast<size_t>(cols), 1.0f);
  std::vector<char> data(row * rows);
  ggml_quantize_chunk(type, values.data(), data.data(), 0, std::min(kOwnRows, rows), cols, importance.data());
  for (int r = kOwnRows; r < rows; ++r) std::memcpy(data.data() + row * r, data.data() + row * (r % kOwnRows), row);
  return data;
}

struct Weights {
  ggml_context* context;
  ggml_tensor *gate, *up, *down;

  Weights(const Options& o, ggml_type type, ggml_backend_t backend, std::mt19937* random) {
    context = ggml_init({ggml_tensor_overhead() * 8, nullptr, true});
    gate = ggml_new_tensor_3d(context, type, o.hidden, o.inter, o.experts);
    up = ggml_new_tensor_3d(context, type, o.hidden, o.inter, o.experts);
    down = ggml_new_tensor_3d(context, type, o.inter, o.hidden, o.experts);
    const ggml_backend_buffer_type_t buffer =
        o.repack ? repack_buffer() : ggml_backend_get_default_buffer_type(backend);
    if (ggml_backend_alloc_ctx_tensors_from_buft(context, buffer) == nullptr) fail("no memory for the weights");
    for (ggml_tensor* tensor : {gate, up, down}) {
      const std::vector<char> data =
          quantised(type, static_cast<int>(tensor->ne[1] * tensor->ne[2]), static_cast<int>(tensor->ne[0]), random);
      ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
    }
  }
  double bytes() const { return static_cast<double>(ggml_nbytes(gate) + ggml_nbytes(up) + ggml_nbytes(down)); }
};

// One layer's graph over its own activations.
struct Graph {
  ggml_context* context;
  ggml_cgraph* graph;
  ggml_tensor *x, *ids, *weights, *output;

  Graph(const Options& o, const Weights& w, int tokens, ggml_backend_t backend) {
    context = ggml_init({ggml_tensor_overhead() * 128 + ggml_graph_overhead(), nullptr, true});
    x = ggml_new_tensor_3d(context, GGML_TYPE_F32, o.hidden, 1, tokens);
    ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, o.top_k, tokens);
    weights = ggml_new_tensor_3d(context, GGML_TYPE_F32, 1, o.top_k, tokens);
    ggml_tensor* gate = ggml_mul_mat_id(context, w.gate, x, ids);
    ggml_tensor* up = ggml_mul_mat_id(context, w.up, x, ids);
    ggml_tensor* picks = ggml_mul_mat_id(context, w.down, ggml_swiglu_split(context, gate, up), ids);
    picks = ggml_mul(context, picks, weights);
    output = nullptr;
    for (int k = 0; k < o.top_k; ++k) {
      ggml_tensor* pick = ggml_view_2d(context, picks, o.hidden, tokens, picks->nb[2], picks->nb[1] * k);
      output = output == nullptr ? pick : ggml_add(context, output, pick);
    }
    graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, output);
    if (ggml_backend_alloc_ctx_tensors(context, backend) == nullptr) fail("no memory for the activations");
  }
};

// Sets new tokens, distinct picks and weights; returns how many experts were picked.
int draw(const Options& o, const Graph& g, int tokens, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(tokens) * o.hidden), weights(static_cast<size_t>(tokens) * o.top_k);
  std::vector<int> ids, experts(o.experts);
  std::vector<bool> active(o.experts, false);
  for (float& value : x) value = normal(*random);
  for (float& value : weights) value = 1.0f / static_cast<float>(o.top_k);
  for (int e = 0; e < o.experts; ++e) experts[e] = e;
  for (int t = 0; t < tokens; ++t) {
    for (int k = 0; k < o.top_k; ++k) {
      std::swap(experts[k], experts[k + static_cast<int>((*random)() % static_cast<unsigned>(o.experts - k))]);
      ids.push_back(experts[k]);
      active[experts[k]] = true;
    }
  }
  ggml_backend_tensor_set(g.x, x.data(), 0, x.size() * sizeof(float));
  ggml_backend_tensor_set(g.ids, ids.data(), 0, ids.size() * sizeof(int));
  ggml_backend_tensor_set(g.weights, weights.data(), 0, weights.size() * sizeof(float));
  return static_cast<int>(std::count(active.begin(), active.end(), true));
}

void measure(const Options& o, const std::vector<Weights>& layers, int tokens, ggml_backend_t backend) {
  std::mt19937 random(7);
  std::vector<Graph> graphs;
  for (const Weights& layer : layers) graphs.emplace_back(o, layer, tokens, backend);
  std::vector<double> seconds;
  double spent = 0.0, active = 0.0;
  for (size_t turn = 0; seconds.size() < 5 || spent < o.seconds; ++turn) {
    const Graph& g = graphs[turn % graphs.size()];
    const int experts = draw(o, g, tokens, &random);
    const Clock::time_point start = Clock::now();
    if (ggml_backend_graph_compute(backend, g.graph) != GGML_STATUS_SUCCESS) fail("the graph did not run");
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    if (turn < graphs.size()) continue;
    seconds.push_back(took);
    spent += took;
    active += experts;
  }
  std::sort(seconds.begin(), seconds.end());
  const auto quantile = [&](double q) { return 1e6 * seconds[static_cast<size_t>(q * (seconds.size() - 1) + 0.5)]; };
  const double bytes = active / seconds.size() * layers[0].bytes() / o.experts;
  std::printf(
      "{\"type\": \"%s\", \"repacked\": %s, \"tokens\": %d, \"median_us\": %.1f, \"p10_us\": %.1f, "
      "\"p90_us\": %.1f, \"runs\": %zu, \"bytes\": %.0f}\n",
      o.type.c_str(), o.repack ? "true" : "false", tokens, quantile(0.5), quantile(0.1), quantile(0.9), seconds.size(),
      bytes);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const ggml_type type = type_named(options.type);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, options.threads);
  std::mt19937 random(1);
  std::vector<Weights> layers;
  double bytes = 0.0;
  while (bytes < 1.3e9) {
    layers.emplace_back(options, type, backend, &random);
    bytes += layers.back().bytes();
  }
  for (const int tokens : options.tokens) measure(options, layers, tokens, backend);
}
