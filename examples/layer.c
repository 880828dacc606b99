/* The smallest program in C: loads a layer of a checkpoint and runs it on made-up tokens.
 *
 *   cc layer.c $(pkg-config --cflags --libs fourmoe) -o layer && ./layer CHECKPOINT */
#include <fourmoe/fourmoe.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, fourmoe_last_error());
  return EXIT_FAILURE;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s CHECKPOINT\n", argv[0]);
    return EXIT_FAILURE;
  }

  fourmoe_checkpoint* checkpoint = NULL;
  if (fourmoe_checkpoint_open(argv[1], &checkpoint) != FOURMOE_OK) return fail("open");
  int32_t index = 0;
  int64_t count = 0;
  if (fourmoe_checkpoint_layers(checkpoint, &index, 1, &count) != FOURMOE_OK) return fail("layers");

  fourmoe_layer* layer = NULL;
  if (fourmoe_layer_load(checkpoint, index, NULL, &layer) != FOURMOE_OK) return fail("load");
  fourmoe_checkpoint_close(checkpoint); /* the layer keeps what it needs */

  fourmoe_layer_info info = {0};
  info.struct_size = sizeof info;
  if (fourmoe_layer_get_info(layer, &info) != FOURMOE_OK) return fail("info");
  printf("layer %d of %lld: hidden %d, intermediate %d, %d experts, top-%d\n", index, (long long)count, info.hidden,
         info.inter, info.experts, info.top_k);

  const int tokens = 4;
  float* hidden = malloc(sizeof(float) * tokens * info.hidden);
  float* output = malloc(sizeof(float) * tokens * info.hidden);
  if (hidden == NULL || output == NULL) return EXIT_FAILURE;
  for (int i = 0; i < tokens * info.hidden; ++i) hidden[i] = (float)(i % 7 - 3) / 4;

  fourmoe_call call = {0};
  call.struct_size = sizeof call;
  call.hidden_states = (fourmoe_tensor){hidden, FOURMOE_F32, 0, tokens, info.hidden, info.hidden};
  call.output = (fourmoe_tensor){output, FOURMOE_F32, 0, tokens, info.hidden, info.hidden};
  if (fourmoe_layer_run(layer, &call, NULL, 0) != FOURMOE_OK) return fail("run");
  printf("output of token 0: %g %g %g ...\n", output[0], output[1], output[2]);

  fourmoe_layer_free(layer);
  free(hidden);
  free(output);
  return EXIT_SUCCESS;
}
