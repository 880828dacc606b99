#!/bin/bash
# The main job on real input: layers of the small NVFP4 model on hidden states that its own forward pass captured.
# Usage: demo.sh [COMMAND]
set -euo pipefail
cd "$(dirname "$0")/.."

command=${1:-build/fourmoe}
model=examples/tiny-moe/nvfp4
capture=examples/tiny-moe/capture.safetensors
out=$(dirname "$command")/demo
mkdir -p "$out"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

echo "The checkpoint: a small Qwen3-MoE language model (examples/tiny-moe), experts in NVFP4."
show "$command" inspect "$model"

for layer in 0 1 2 3; do
  input=$out/layer$layer.in.safetensors output=$out/layer$layer.out.safetensors
  python3 scripts/tensors.py take "$capture" "$input" "layer$layer.hidden_states=hidden_states"
  show "$command" run "$model" --layer "$layer" --input "$input" --output "$output"  # compares with the reference
  printf 'error against the forward pass in torch, rel-L2: '
  python3 scripts/tensors.py compare "$output" output "$capture" "layer$layer.output_w4a16" 1e-2
done
printf '\nAll four layers are within their bounds. Outputs are in %s.\n' "$out"
