#!/usr/bin/env python3
"""fourmoe as transformers' implementation of the experts: four families, and the shipped model end to end."""
import importlib.util
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
needs_accelerate = unittest.skipUnless(importlib.util.find_spec("accelerate"),
                                       "transformers reads MXFP4 checkpoints with accelerate alone")


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

    @needs_accelerate
    def test_mxfp4_of_gpt_oss_stays_in_4_bits(self):
        check_mxfp4(self, "cpu")

    @needs_accelerate
    def test_mxfp4_is_transformers_own_for_other_implementations(self):
        with tempfile.TemporaryDirectory() as folder:
            dense = save_mxfp4(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager",
                                                                      dtype=torch.bfloat16)
            self.assertTrue(torch.equal(experts_of(model)[0].down_proj, experts_of(dense)[0].down_proj))

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


def save_mxfp4(folder):
    """A gpt-oss checkpoint as OpenAI stores it, experts of random MXFP4; returns the model with the same values in bf16."""
    model = make_model("gpt_oss", torch.bfloat16)
    state = model.state_dict()
    for name, module in model.named_modules():
        if not face.is_experts(module):
            continue
        for projection in ("gate_up_proj", "down_proj"):
            experts, inputs, outputs = state[f"{name}.{projection}"].shape
            codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
            values = fourmoe.decode(codes.flatten(2), scales)
            getattr(module, projection).copy_(values.transpose(1, 2))
            state.pop(f"{name}.{projection}")
            state |= {f"{name}.{projection}_blocks": codes, f"{name}.{projection}_scales": scales}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, pathlib.Path(folder) / "model.safetensors",
              {"format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}
    del config["moe_intermediate_size"]  # of the other families
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(config, default=str))
    return model


def check_mxfp4(test, device, precision="fourmoe"):
    with tempfile.TemporaryDirectory() as folder:
        dense = save_mxfp4(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=precision).eval().to(device)
        tokens = torch.randint(0, 96, (1, 7), device=device)
        test.assertEqual(model(tokens).logits.device.type, device)
        modules = experts_of(model)
        test.assertEqual([name for module in modules for name, _ in module.named_parameters()], [])
        for module, own in zip(modules, experts_of(dense.float())):
            test.assertEqual([layer.encoding for layer in module._fourmoe_layers.values()],
                             ["mxfp4"] * len(module._fourmoe_layers))
            x, ids, weights = torch.randn(9, 64).bfloat16(), torch.rand(9, 8).topk(3).indices, torch.rand(9, 3)
            expected = own(x.float(), ids, weights)
            found = module(x.to(device), ids.to(device), weights.to(device))
            test.assertLess(relative_l2(found.float().cpu(), expected), 5e-3)  # two roundings to bf16


def load(folder, implementation, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(TINY / folder, experts_implementation=implementation,
                                                             **options).eval()


def bits_per_byte(model):
    windows = CAPTURE["tokens"].long().to(model.device)
    nats = [torch.nn.functional.cross_entropy(model(window[None, :-1], use_cache=False).logits[0], window[1:])
            for window in windows]
    return float(sum(nats)) / len(windows) / math.log(2)


def expected_bits(name):
    with open(TINY / "capture.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return float(header["__metadata__"][f"bits_per_byte.{name}"])


def check_bits(test, model, name, tolerance):
    bits, expected = bits_per_byte(model), expected_bits(name)
    print(f"bits per byte through transformers on {model.device}, {name}: {bits:.4f} (torch {expected:.4f})", file=sys.stderr)
    test.assertAlmostEqual(bits, expected, delta=tolerance)


def check_text(test, model, prompt, what):
    output = model.generate(torch.tensor([list(prompt)], device=model.device), max_new_tokens=60, do_sample=False)
    text = bytes(output[0].tolist())
    print(f"{what}: {text.decode('ascii', 'replace')!r}", file=sys.stderr)
    test.assertTrue(text.startswith(prompt + b"priest"))
    test.assertGreater(len(text[len(prompt):].split()[:-1]), 8)


class TinyModel(unittest.TestCase):
    def measure(self, folder, implementation, name, tolerance):
        check_bits(self, load(folder, implementation, dtype=torch.float32), name, tolerance)

    # Bounds as in quality_test.py.
    def test_bits_per_byte_bf16(self):
        self.measure("bf16", "fourmoe", "bf16", 5e-4)

    def test_bits_per_byte_w4a16(self):
        self.measure("nvfp4", "fourmoe", "w4a16", 5e-4)

    def test_bits_per_byte_w4a4(self):
        self.measure("nvfp4", "fourmoe_w4a4", "w4a4", 3e-3)

    # Activations in int8 lose less than the exact precision's bound on this text; that they are used shows in the bits.
    def test_bits_per_byte_w4a8_int8(self):
        exact = load("nvfp4", "fourmoe", dtype=torch.float32)
        lossy = load("nvfp4", "fourmoe_w4a8_int8", dtype=torch.float32)
        self.assertNotEqual(bits_per_byte(lossy), bits_per_byte(exact))
        check_bits(self, lossy, "w4a16", 2e-3)

    def test_generates_text(self):
        prompt = b"And the priest said unto the "
        for folder, implementation in (("bf16", "fourmoe"), ("nvfp4", "fourmoe"), ("nvfp4", "fourmoe_w4a4")):
            check_text(self, load(folder, implementation), prompt, f"{folder}, {implementation}")

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

    def test_other_implementations_are_refused(self):
        with self.assertRaisesRegex(ValueError, "experts_implementation is 'eager', but .* expected one of fourmoe, fourmoe"):
            load("nvfp4", "eager")

    def test_conversions_come_with_the_model_or_without_it(self):
        quantizer = face.ModelOptQuantizer(face.ModelOptConfig(quant_algo="NVFP4"))
        self.assertEqual((quantizer.update_weight_conversions([]), quantizer.update_weight_conversions([], None)), ([], []))

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


class OnAGpu(unittest.TestCase):
    def setUp(self):
        if not torch.cuda.is_available():
            self.skipTest("no GPU here")
        try:
            fourmoe.load(TINY / "nvfp4", layer=0, device="cuda")
        except fourmoe.UnavailableError as error:
            self.skipTest(str(error))

    def test_families(self):
        for family in FAMILIES:
            host, device = make_model(family, torch.bfloat16), make_model(family, torch.bfloat16).cuda()
            host.float().set_experts_implementation("eager")
            device.set_experts_implementation("fourmoe")
            torch.manual_seed(1)
            x, ids, weights = torch.randn(33, 64).bfloat16(), torch.rand(33, 8).topk(3).indices, torch.rand(33, 3)
            expected = experts_of(host)[0](x.float(), ids, weights)
            found = experts_of(device)[0](x.cuda(), ids.cuda(), weights.cuda())
            self.assertEqual((found.dtype, found.device.type), (torch.bfloat16, "cuda"))
            self.assertLess(relative_l2(found.float().cpu(), expected), 5e-3, family)  # two roundings to bf16

    def test_whole_models(self):
        for family in FAMILIES:
            model = make_model(family, torch.bfloat16).cuda()
            tokens = torch.randint(0, 96, (2, 11), device="cuda")
            model.set_experts_implementation("eager")
            expected = model(tokens).logits
            model.set_experts_implementation("fourmoe")
            found = model(tokens).logits
            # As on a CPU: a token near a tie of its router takes another expert.
            close = ((found - expected).float().norm(dim=-1) < 0.1 * expected.float().norm(dim=-1)).float().mean()
            self.assertGreater(float(close), 0.8, family)

    def test_compile_without_graph_breaks(self):
        model = make_model("qwen3_moe", torch.bfloat16).cuda()
        model.set_experts_implementation("fourmoe")
        face.prepare(model)
        module = experts_of(model)[0]
        call = (torch.randn(5, 64, device="cuda").bfloat16(), torch.rand(5, 8, device="cuda").topk(3).indices,
                torch.rand(5, 3, device="cuda"))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(*call), module(*call), rtol=0, atol=0)

    # As on a CPU: attention in f32, bounds as in quality_test.py. Experts of the bf16 model are bf16, which is exact.
    def test_bits_per_byte(self):
        for folder, implementation, name, tolerance in (("bf16", "fourmoe", "bf16", 5e-4), ("nvfp4", "fourmoe", "w4a16", 5e-4),
                                                        ("nvfp4", "fourmoe_w4a4", "w4a4", 3e-3)):
            model = load(folder, implementation, dtype=torch.float32).cuda()
            for module in experts_of(model):
                module.bfloat16()
            check_bits(self, model, name, tolerance)

    def test_generates_text(self):
        for folder, implementation in (("bf16", "fourmoe"), ("nvfp4", "fourmoe"), ("nvfp4", "fourmoe_w4a4")):
            model = load(folder, implementation, device_map="cuda")
            check_text(self, model, b"And the priest said unto the ", f"{folder}, {implementation}, on a GPU")

    @needs_accelerate
    def test_mxfp4_of_gpt_oss(self):
        check_mxfp4(self, "cuda")

    def test_experts_of_f32_are_refused(self):
        model = make_model("qwen3_moe").cuda()
        model.set_experts_implementation("fourmoe")
        with self.assertRaisesRegex(fourmoe.Error, "weights are f32; nvfp4, mxfp4 or bf16 would pass"):
            model(torch.zeros(1, 4, dtype=torch.long, device="cuda"))


if __name__ == "__main__":
    unittest.main()
