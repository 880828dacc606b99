#!/usr/bin/env python3
"""Layers of checkpoints that transformers saves, with their own routers, against transformers' MoE blocks.

Every family that the library knows and transformers has, read from one folder by both: with keys that differ from their
defaults, with keys that only other families read, and without the keys that may be absent.
"""
import inspect
import json
import logging
import pathlib
import re
import tempfile
import unittest

from package import fourmoe, relative_l2, require

torch, transformers = require("torch", "transformers")
require("safetensors")

logging.disable(logging.WARNING)
transformers.logging.disable_progress_bar()
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the blocks are too small to share
H, T, E = 64, 40, 16
SMALL = {
    "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 96,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "shared_intermediate_size": 80,
    "moe_shared_expert_intermediate_size": 80, "intermediate_size_mlp": 64, "dense_intermediate_size": 96,
    "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E, "num_experts_per_tok": 3,
    "moe_k": 3, "n_shared_experts": 2, "num_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2,
    "index_head_dim": 16, "index_topk": 8, "sliding_window": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
BOTH_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
FAMILIES = {
    "deepseek_v2": {}, "deepseek_v3": {}, "deepseek_v32": BOTH_SPARSE, "deepseek_v4": {"mlp_layer_types": ["moe"] * 2},
    "dots1": {}, "ernie4_5_moe": {}, "glm4_moe": {}, "glm4_moe_lite": BOTH_SPARSE, "glm4v_moe_text": {},
    "glm_moe_dsa": BOTH_SPARSE, "gpt_oss": {}, "llama4_text": {"num_experts_per_tok": 1}, "minimax": {},
    "minimax_m2": {}, "minimax_m3_vl_text": BOTH_SPARSE, "mistral4": {}, "mixtral": {}, "nemotron_h": {}, "olmoe": {},
    "qwen2_moe": {}, "qwen3_5_moe_text": {}, "qwen3_moe": {}, "qwen3_next": {}, "qwen3_vl_moe_text": {}}
# Families that no row knows: those that route by plain softmax are computed, the others refused.
PLAIN = ("flex_olmo", "lara_mini", "mellum")
OTHERS = (*PLAIN, "cohere2_moe", "kolibri1", "lfm2_moe")
# Keys that some families read and others do not; values that no family has by default.
SAID = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0, "norm_topk_prob": False, "hidden_act": "gelu"}
MAY_BE_ABSENT = [*SAID, "topk_method", "scoring_func", "swiglu_alpha", "swiglu_limit", "mlp_hidden_act", "moe_norm_min"]
SILU = ("deepseek_v4", "nemotron_h")  # of another hidden_act they are refused


def loader(config):
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if known else transformers.AutoModel


def save(family, folder, more):
    """Saves a random model in bf16; returns its first MoE block, that layer's number, and config.json."""
    kind = transformers.CONFIG_MAPPING[family]
    usual = kind().to_dict()
    names = {**kind.attribute_map, **{key: key for key in usual}}  # what the class takes
    settings = {names[key]: value for key, value in SMALL.items() if names.get(key) in usual}
    settings.update({key: None for key in ("layer_types", "layers_block_type") if key in usual}, **more)
    config = kind(**settings)
    torch.manual_seed(0)
    model = loader(config).from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in name:
            tensor.copy_(0.3 * torch.randn(tensor.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    name, block = next((n, m) for n, m in model.named_modules() if "experts" in dict(m.named_children()))
    return block, int(re.findall(r"layers\.(\d+)", name)[-1]), json.loads((folder / "config.json").read_text())


def without(config, keys):
    return {key: value for key, value in config.items() if key not in keys}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def compute(folder, saved, layer, x):
    """What transformers makes of config.json: a block of the saved one's weights, in f32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    takes_layer = "layer_idx" in inspect.signature(type(saved).__init__).parameters
    block = type(saved)(config, layer_idx=layer) if takes_layer else type(saved)(config)
    block.load_state_dict(saved.state_dict())
    output = block.float().eval()(x[None])
    return (output[0] if isinstance(output, tuple) else output).reshape(T, H)


class Layers(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)
        self.x = torch.randn(T, H).bfloat16().float()
        self.scratch = tempfile.TemporaryDirectory()
        self.addCleanup(self.scratch.cleanup)

    def folder(self, family):
        if family not in transformers.CONFIG_MAPPING:
            self.skipTest(f"this transformers has no {family}")
        path = pathlib.Path(self.scratch.name) / family
        path.mkdir()
        return path

    def check(self, folder, saved, layer, config):
        write(folder, config)
        found = fourmoe.load(folder, layer=layer)(self.x)
        self.assertLess(relative_l2(found, compute(folder, saved, layer, self.x)), 5e-3)  # the intermediate is bf16

    def test_families(self):
        for family, more in FAMILIES.items():
            with self.subTest(family):
                folder = self.folder(family)
                saved, layer, plain = save(family, folder, more)
                said = {**plain, **SAID}
                if family in SILU:
                    said["hidden_act"] = "silu"
                if family == "deepseek_v2":
                    said["topk_method"] = "group_limited_greedy"
                with self.subTest("keys said"):
                    self.check(folder, saved, layer, said)
                with self.subTest("keys absent"):
                    self.check(folder, saved, layer, without(plain, MAY_BE_ABSENT))
                if family != "deepseek_v2":  # it groups by method alone, and is refused where it renormalises
                    with self.subTest("topk_group absent"):
                        groups = {**plain, "n_group": 4, "norm_topk_prob": True}
                        self.check(folder, saved, layer, without(groups, ["topk_group"]))

    def test_kimi_k2_is_read_as_deepseek_v3(self):
        folder = self.folder("deepseek_v3")
        saved, layer, plain = save("deepseek_v3", folder, {})
        plain = without(plain, MAY_BE_ABSENT)
        write(folder, plain)
        expected = compute(folder, saved, layer, self.x)
        write(folder, {**plain, "model_type": "kimi_k2"})
        self.assertLess(relative_l2(fourmoe.load(folder, layer=layer)(self.x), expected), 5e-3)

    def test_other_families_are_computed_or_refused(self):
        for family in OTHERS:
            with self.subTest(family):
                folder = self.folder(family)
                more = {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0} if family == "lfm2_moe" else {}
                saved, layer, plain = save(family, folder, more)
                config = {**plain, "hidden_act": "silu"}
                if family in PLAIN:
                    self.check(folder, saved, layer, config)
                    continue
                write(folder, config)
                with self.assertRaisesRegex(fourmoe.ArgumentError, "is not known and"):
                    fourmoe.load(folder, layer=layer)


if __name__ == "__main__":
    unittest.main()
