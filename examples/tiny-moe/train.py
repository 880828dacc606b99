#!/usr/bin/env python3
"""Trains the tiny Qwen3-MoE language model on bytes and saves it as a Hugging Face checkpoint in bf16.

    python train.py --text text --out bf16 --log training.json

The weights are bf16 throughout; the optimiser keeps f32 copies and rounds them after each step, so the
saved weights are exactly the ones that were trained. The checkpoint with the lowest held-out bits per byte is kept.
"""
import argparse
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CONTEXT = 512  # bytes


def tiny_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, max_position_embeddings=CONTEXT,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=32, num_experts_per_tok=4, norm_topk_prob=True, moe_intermediate_size=64,
        decoder_sparse_step=1, mlp_only_layers=[], intermediate_size=64,
        tie_word_embeddings=True, router_aux_loss_coef=0.01, bos_token_id=None, eos_token_id=None)


def forward(model, window):
    """window [B, T] i64 -> cross entropy in nats per predicted byte, list of router logits [B*T, E] per layer."""
    out = model.model(window[:, :-1], output_router_logits=True, use_cache=False)
    logits = model.lm_head(out.last_hidden_state).float()
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()), out.router_logits


def expert_shares(router_logits, top_k):
    """router_logits [N, E] -> share of picks [E] and mean probability [E]; both are 1/E when load is balanced."""
    probabilities = router_logits.float().softmax(-1)
    picks = probabilities.topk(top_k, -1).indices.flatten()
    counts = torch.zeros_like(probabilities[0]).scatter_add_(0, picks, torch.ones_like(picks, dtype=torch.float32))
    return counts / picks.numel(), probabilities.mean(0)


def balance_loss(layers, top_k):
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4), layer by layer; 1 when load is balanced."""
    shares = [expert_shares(logits, top_k) for logits in layers]
    return sum((picked * probability).sum() * picked.numel() for picked, probability in shares) / len(shares)


@torch.no_grad()
def evaluate(model, text, batch):
    """Bits per byte over consecutive windows of `text` [N] u8; each window starts without context."""
    windows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    nats = sum(forward(model, part)[0].item() * len(part) for part in windows.split(batch))
    return nats / len(windows) / math.log(2)


def save(model, out: pathlib.Path) -> None:
    """transformers holds the experts fused, but writes them under the hub's per-expert names."""
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    # Readers of hub checkpoints look for these two under their older names.
    config["num_experts"] = model.config.num_experts
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, default="text", help="folder with train.bin and heldout.bin")
    parser.add_argument("--out", type=pathlib.Path, default="bf16", help="checkpoint folder to write")
    parser.add_argument("--log", type=pathlib.Path, default="training.json", help="loss curve to write")
    parser.add_argument("--epochs", type=float, default=24, help="passes over the text (windows are drawn at random)")
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=60, help="time limit; the learning rate decays to fit it")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text, heldout = (torch.from_numpy(np.fromfile(args.text / f"{part}.bin", np.uint8)).to(args.device)
                     for part in ("train", "heldout"))
    config = tiny_config()
    model = Qwen3MoeForCausalLM(config).to(args.device)
    master = [p.detach().clone().requires_grad_() for p in model.parameters()]  # f32
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in master if p.ndim > 1], "weight_decay": args.weight_decay},
         {"params": [p for p in master if p.ndim == 1], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), foreach=True)

    steps = max(1, round(args.epochs * len(text) / (args.batch * CONTEXT)))
    warmup = max(1, steps // 50)
    every = math.ceil(steps / args.evaluations)
    offsets = torch.arange(CONTEXT, device=args.device)
    curve, best, begin, progress, step = [], math.inf, time.monotonic(), 0.0, 0
    while progress < 1:
        progress = max((step + 1) / steps, (time.monotonic() - begin) / (60 * args.minutes))
        rate = args.lr * min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for group in optimizer.param_groups:
            group["lr"] = rate

        starts = torch.randint(len(text) - CONTEXT, (args.batch, 1), device=args.device)
        loss, router_logits = forward(model, text[starts + offsets].long())
        (loss + config.router_aux_loss_coef * balance_loss(router_logits, config.num_experts_per_tok)).backward()
        for p, m in zip(model.parameters(), master):
            m.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), master)
        step += 1

        if step % every == 0 or progress >= 1:
            bits = evaluate(model, heldout, 4 * args.batch)
            shares = torch.stack([expert_shares(logits, config.num_experts_per_tok)[0] for logits in router_logits])
            row = {"step": step, "epoch": step * args.batch * CONTEXT / len(text), "lr": rate,
                   "train_bits_per_byte": loss.item() / math.log(2), "heldout_bits_per_byte": bits,
                   "expert_share_min": shares.min().item() * config.num_experts,
                   "expert_share_max": shares.max().item() * config.num_experts,
                   "seconds": time.monotonic() - begin}
            curve.append({key: round(value, 6) for key, value in row.items()})
            print(" ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
            if bits < best:
                best = bits
                save(model, args.out)

    options = {key: value for key, value in vars(args).items() if not isinstance(value, pathlib.Path)}
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"options": options, "device": device, "versions": versions, "parameters": sum(p.numel() for p in master),
              "best_heldout_bits_per_byte": best, "curve": curve}
    lines = json.dumps(record).replace('"curve": [', '"curve": [\n ').replace("}, {", "},\n  {")
    args.log.write_text(lines + "\n")


if __name__ == "__main__":
    main()
