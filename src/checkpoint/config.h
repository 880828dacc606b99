// Config: what config.json and hf_quant_config.json say about a model's MoE layers.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "checkpoint/families.h"
#include "flow.h"

namespace fourmoe::checkpoint {

// How the weights were quantised, in the checkpoint's own words; empty strings where it does not say.
struct Quantisation {
  std::string method;     // quant_method: "modelopt", "compressed-tensors", "mxfp4"
  std::string algorithm;  // quant_algo or format: "NVFP4", "nvfp4-pack-quantized"
  std::string producer;   // name and version
};

struct Config {
  std::string file;    // for messages
  std::string family;  // model_type without "_text"
  Family row;          // what is known of it; a generic one for a model_type that is not
  i32 hidden = 0;
  i32 inter = 0;  // of one routed expert; 0 when the config does not say
  i32 experts = 0;
  std::string experts_key;  // the key that says so
  i32 top_k = 0;
  i32 layers = 0;  // num_hidden_layers; 0 when the config does not say
  i32 latent = 0;  // width on which the experts work when it is not `hidden` (Nemotron's moe_latent_size); else 0
  Activation activation;
  Routing routing;
  Quantisation quantisation;
};

// Throws file_malformed with file and key, family_unknown with the known families, activation_unsupported,
// routing_unsupported.
// `quant_text`: hf_quant_config.json, empty when there is none.
Config parse_config(std::string_view text, std::string_view file, std::string_view quant_text = {},
                    std::string_view quant_file = {});

// A layer of the model with experts in this encoding: all experts local, w4a16, max_tokens 0.
Problem make_problem(const Config& config, format::Encoding encoding);

// The shared expert as a layer of its own: one expert, picked by every token with weight 1.
Problem make_shared_problem(const Config& config, format::Encoding encoding, i32 inter);

// Whether weights of this method and algorithm mean what their names say to this reader; if not, why.
std::optional<std::string> find_unreadable_algorithm(const Quantisation& quantisation);

}  // namespace fourmoe::checkpoint
