/* Builds a layer from weights in memory, in plain C, and checks a result that is known: every weight is 1/16, every
 * token is all ones, so up = 1, relu(1)^2 = 1, down = 1, and the routing weights sum to 1. */
#include <fourmoe/fourmoe.h>
#include <stdio.h>
#include <string.h>

enum { kHidden = 16, kInter = 16, kExperts = 2, kTopK = 2, kTokens = 3 };

static int refused(const char* call) {
  fprintf(stderr, "own_weights: %s: %s\n", call, fourmoe_last_error());
  return 1;
}

int main(void) {
  static uint8_t codes[kInter * kHidden / 2];
  static uint8_t scales[kInter * kHidden / 16];
  memset(codes, 0x22, sizeof codes);   /* E2M1: 1.0 in both nibbles */
  memset(scales, 0x38, sizeof scales); /* E4M3: 1.0 */

  fourmoe_matrix matrix = {0}; /* square here, so that up and down may share it */
  matrix.data = codes;
  matrix.scales = scales;
  matrix.global_scale = 1.0f / 16;

  static fourmoe_expert experts[kExperts];
  for (int e = 0; e < kExperts; ++e) experts[e].up = experts[e].down = matrix;

  fourmoe_layer_desc desc = {0};
  desc.struct_size = sizeof desc;
  desc.hidden = kHidden;
  desc.inter = kInter;
  desc.experts = kExperts;
  desc.top_k = kTopK;
  desc.encoding = FOURMOE_WEIGHTS_NVFP4;
  desc.activation = FOURMOE_RELU2;
  desc.expert_table = experts;

  fourmoe_layer* layer = NULL;
  if (fourmoe_layer_create(&desc, NULL, &layer) != FOURMOE_OK) return refused("fourmoe_layer_create");

  float hidden[kTokens * kHidden], output[kTokens * kHidden];
  for (int i = 0; i < kTokens * kHidden; ++i) hidden[i] = 1.0f;
  int32_t ids[kTokens * kTopK] = {0, 1, 1, 0, 1, -1}; /* -1: no pick */
  float weights[kTokens * kTopK] = {0.75f, 0.25f, 0.5f, 0.5f, 1.0f, 0.0f};

  fourmoe_call call = {0};
  call.struct_size = sizeof call;
  call.hidden_states = (fourmoe_tensor){hidden, FOURMOE_F32, 0, kTokens, kHidden, kHidden};
  call.topk_ids = (fourmoe_tensor){ids, FOURMOE_I32, 0, kTokens, kTopK, kTopK};
  call.topk_weights = (fourmoe_tensor){weights, FOURMOE_F32, 0, kTokens, kTopK, kTopK};
  call.output = (fourmoe_tensor){output, FOURMOE_F32, 0, kTokens, kHidden, kHidden};
  const fourmoe_status status = fourmoe_layer_run(layer, &call, NULL, 0);
  fourmoe_layer_free(layer);
  if (status != FOURMOE_OK) return refused("fourmoe_layer_run");

  for (int i = 0; i < kTokens * kHidden; ++i) {
    if (output[i] != 1.0f) {
      fprintf(stderr, "own_weights: output %d is %g, not 1\n", i, output[i]);
      return 1;
    }
  }
  printf("fourmoe %s: %d tokens, every output is 1\n", fourmoe_version(), kTokens);
  return 0;
}
