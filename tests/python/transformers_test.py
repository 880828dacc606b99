#!/usr/bin/env python3
"""fourmoe as transformers' implementation of the experts: four families, and the shipped model end to end."""
import json
import logging
import math
import pathlib
import shutil
import sys
import tempfile
import unittest

from package import TINY, fourmoe, relative_l2, require

torch, transformers = require("torch", "transformers")
require("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

import fourmoe.compat.transformers as face  # noqa: E402

logging.disable(logging.WARNING)
torch.set_grad_enabled(False)
CAPTURE = load_file(TINY / "capture.safetensors")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts_per_tok": 3, "pad_token_id": 0}
FAMILIES = {
    "qwen3_moe": {"num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16,
                    "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
                    "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16, "sliding_window": 16},
}


def make_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def experts_of(model):
    return [module for module in model.modules() if face.is_experts(module)]


class Families(unittest.TestCase):
    def check(self, family):
        model = make_model(family)
        x = torch.randn(33, 64).bfloat16().float()
        ids = torch.rand(33, 8).topk(3).indices
        weights = torch.rand(33, 3)
        module = experts_of(model)[0]
        model.set_experts_implementation("eager")
        expected = module(x, ids, weights)
        model.set_experts_implementation("fourmoe")
        found = module(x, ids, weights)
        self.assertEqual(found.dtype, expected.dtype)
        self.assertLess(relative_l2(found, expected), 3e-3)  # the intermediate is rounded to bf16
        self.assertLess(relative_l2(found[:1], module(x[:1], ids[:1], weights[:1])), 1e-12)
        model.set_experts_implementation("fourmoe_w4a4")
        with self.assertRaisesRegex(fourmoe.ArgumentError, "w4a4 needs 4-bit weights"):
            module(x, ids, weights)

    def test_qwen3_moe(self):
        self.check("qwen3_moe")

    def test_mixtral(self):
        self.check("mixtral")

    def test_deepseek_v3(self):
        self.check("deepseek_v3")

    def test_gpt_oss(self):
        self.check("gpt_oss")

    def test_whole_models_in_bf16(self):
        for family in FAMILIES:
            model = make_model(family, torch.bfloat16)
            tokens = torch.randint(0, 96, (2, 11))
            model.set_experts_implementation("eager")
            expected = model(tokens).logits
            model.set_experts_implementation("fourmoe")
            found = model(tokens).logits
            self.assertEqual(found.shape, expected.shape)
            # Rounding moves a router's logits, and a token near a tie takes another expert: most tokens agree.
            close = ((found - expected).float().norm(dim=-1) < 0.1 * expected.float().norm(dim=-1)).float().mean()
            self.assertGreater(close, 0.8, family)

    def test_swapped_halves_would_be_noticed(self):
        model = make_model("qwen3_moe")
        module = experts_of(model)[0]
        x, ids, weights = torch.randn(5, 64), torch.rand(5, 8).topk(3).indices, torch.rand(5, 3)
        model.set_experts_implementation("eager")
        expected = module(x, ids, weights)
        model.set_experts_implementation("fourmoe")
        self.assertLess(relative_l2(module(x, ids, weights), expected), 5e-3)
        module.gate_up_proj.copy_(module.gate_up_proj.roll(48, 1))
        face.forget(model)  # the parameters were changed
        self.assertGreater(relative_l2(module(x, ids, weights), expected), 0.1)

    def test_unknown_activations_are_refused(self):
        model = make_model("mixtral")
        module = experts_of(model)[0]
        module.config.hidden_act = "tanh"
        with self.assertRaisesRegex(RuntimeError, "MixtralExperts: activation 'tanh' of these experts is not known"):
            face.pack_experts(module, 2)

    def test_compile_without_graph_breaks(self):
        model = make_model("qwen3_moe")
        model.set_experts_implementation("fourmoe")
        face.prepare(model)
        module = experts_of(model)[0]
        x, ids, weights = torch.randn(5, 64), torch.rand(5, 8).topk(3).indices, torch.rand(5, 3)
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights), rtol=0, atol=0)


def load(folder, implementation, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(TINY / folder, experts_implementation=implementation,
                                                             **options).eval()


def bits_per_byte(model):
    windows = CAPTURE["tokens"].long()
    nats = [torch.nn.functional.cross_entropy(model(window[None, :-1], use_cache=False).logits[0], window[1:])
            for window in windows]
    return float(sum(nats)) / len(windows) / math.log(2)


class TinyModel(unittest.TestCase):
    def measure(self, folder, implementation, name, tolerance):
        bits = bits_per_byte(load(folder, implementation, dtype=torch.float32))
        with open(TINY / "capture.safetensors", "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected = float(header["__metadata__"][f"bits_per_byte.{name}"])
        print(f"bits per byte through transformers, {name}: {bits:.4f} (torch {expected:.4f})", file=sys.stderr)
        self.assertAlmostEqual(bits, expected, delta=tolerance)

    # Bounds as in quality_test.py.
    def test_bits_per_byte_bf16(self):
        self.measure("bf16", "fourmoe", "bf16", 5e-4)

    def test_bits_per_byte_w4a16(self):
        self.measure("nvfp4", "fourmoe", "w4a16", 5e-4)

    def test_bits_per_byte_w4a4(self):
        self.measure("nvfp4", "fourmoe_w4a4", "w4a4", 3e-3)

    def test_generates_text(self):
        prompt = b"And the priest said unto the "
        for folder, implementation in (("bf16", "fourmoe"), ("nvfp4", "fourmoe"), ("nvfp4", "fourmoe_w4a4")):
            output = load(folder, implementation).generate(torch.tensor([list(prompt)]), max_new_tokens=60, do_sample=False)
            text = bytes(output[0].tolist())
            print(f"{folder}, {implementation}: {text.decode('ascii', 'replace')!r}", file=sys.stderr)
            self.assertTrue(text.startswith(prompt + b"priest"))
            words = text[len(prompt):].split()[:-1]
            self.assertGreater(len(words), 8)

    def test_the_same_text_as_transformers_own_experts(self):
        prompt = torch.tensor([list(b"In the beginning ")])
        own = load("bf16", "eager", dtype=torch.float32).generate(prompt, max_new_tokens=40, do_sample=False)
        ours = load("bf16", "fourmoe", dtype=torch.float32).generate(prompt, max_new_tokens=40, do_sample=False)
        self.assertTrue(torch.equal(own, ours))

    def test_experts_stay_in_4_bits(self):
        model = load("nvfp4", "fourmoe")
        self.assertEqual([name for name, _ in model.named_parameters() if "experts" in name], [])
        layer = face.layer_of(experts_of(model)[0], "w4a16", 4, model.device)
        self.assertEqual(layer.encoding, "nvfp4")
        self.assertLess(layer.packed_bytes, 32 * 3 * 128 * 64 * 0.65)

    def test_on_a_gpu(self):
        if not torch.cuda.is_available():
            self.skipTest("no GPU here")
        model = load("nvfp4", "fourmoe", dtype=torch.bfloat16)
        tokens = CAPTURE["tokens"][0, :64].long()[None]
        host = model(tokens).logits.float()
        try:
            device = model.cuda()(tokens.cuda()).logits.float().cpu()
        except fourmoe.UnavailableError as error:
            self.skipTest(str(error))
        self.assertLess(relative_l2(device, host), 5e-2)  # attention in bf16 is torch's own on each

    def test_other_implementations_are_refused(self):
        with self.assertRaisesRegex(ValueError, "experts_implementation is 'eager', but .* expected one of fourmoe, fourmoe"):
            load("nvfp4", "eager")

    def test_quantised_attention_is_decoded(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(TINY / "nvfp4", folder, dirs_exist_ok=True)
            tensors = load_file(TINY / "nvfp4" / "model.safetensors")
            name = "model.layers.1.self_attn.q_proj"
            dense = tensors.pop(f"{name}.weight")
            codes, scales, scale_2 = fourmoe.quantize(dense)
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scales.view(torch.float8_e4m3fn),
                        f"{name}.weight_scale_2": scale_2, f"{name}.input_scale": torch.tensor(0.01)}
            save_file(tensors, pathlib.Path(folder) / "model.safetensors", {"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="fourmoe")
            weight = model.model.layers[1].self_attn.q_proj.weight
            self.assertEqual(weight.dtype, torch.bfloat16)
            torch.testing.assert_close(weight, fourmoe.decode(codes, scales, scale_2).bfloat16(), rtol=0, atol=0)
            self.assertLess(relative_l2(weight.float(), dense.float()), 0.12)


if __name__ == "__main__":
    unittest.main()
