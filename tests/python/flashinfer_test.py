#!/usr/bin/env python3
"""FlashInfer's faces against arithmetic in f64 on the same codes: layouts, scales, activations, experts elsewhere."""
import gc
import inspect
import unittest

from package import bf16, fourmoe, np, relative_l2, require, sigmoid, swiglu

torch = require("torch")
from fourmoe.compat import flashinfer as face  # noqa: E402

T, E, H, I, K = 19, 6, 128, 192, 3


def to_atoms(linear):
    """[L, R, C] bytes -> the view of six dimensions over memory in the order L, R/128, C/4, 32, 4, 4."""
    count, rows, blocks = linear.shape
    padded = torch.zeros(count, -(-rows // 128) * 128, -(-blocks // 4) * 4, dtype=torch.uint8)
    padded[:, :rows, :blocks] = linear
    tiles = padded.view(count, padded.shape[1] // 128, 4, 32, padded.shape[2] // 4, 4)
    memory = tiles.permute(0, 1, 4, 3, 2, 5).contiguous()  # L, m-tile, k-tile, row in 32, which 32, block in 4
    return memory.view(torch.float8_e4m3fn).permute(3, 4, 1, 5, 2, 0)


def interleave(up, gate, group):
    """[L, I, ...] twice -> [L, 2I, ...], groups of rows alternating, up first."""
    count, rows = up.shape[:2]
    halves = torch.stack([half.reshape(count, rows // group, group, -1) for half in (up, gate)], 2)
    return halves.reshape(count, 2 * rows, *up.shape[2:]).contiguous()


class Weights:
    """Random weights in both the caller's layout and decoded."""

    def __init__(self, group=64, gated=True, experts=E, seed=0):
        torch.manual_seed(seed)
        self.dense, parts = {}, {}
        for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I))):
            codes, scales, _ = fourmoe.quantize(torch.randn(experts, *shape) / 8, global_scale=2.0 ** -8)
            self.dense[name] = fourmoe.decode(codes, scales).double().numpy()
            parts[name] = codes, scales
        group = I if group == 0 else group
        fuse = (lambda i: interleave(parts["up"][i], parts["gate"][i], group)) if gated else (lambda i: parts["up"][i])
        self.w1, self.w1_sf = fuse(0), to_atoms(fuse(1))
        self.w2, self.w2_sf = parts["down"][0], to_atoms(parts["down"][1])
        self.alpha1 = 2.0 ** -8 * torch.linspace(0.75, 1.25, experts)
        self.alpha2 = 2.0 ** -8 * torch.linspace(1.2, 0.8, experts)


def tokens(experts=E, seed=1):
    torch.manual_seed(seed)
    ids = torch.rand(T, experts).topk(K).indices.int()
    return torch.randn(T, H).bfloat16(), ids, torch.rand(T, K)


def through_nvfp4(values, scale):
    """f64 values rounded to NVFP4 under a scale, block by block: written anew, not the library's."""
    v = np.asarray(values, np.float64).reshape(-1, 16)
    block = np.abs(v).max(1) / 6 / scale
    sf = torch.from_numpy(np.minimum(block, 448).astype(np.float32)).to(torch.float8_e4m3fn).double().numpy()
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    safe = np.where(sf == 0, 1, sf)[:, None] * scale
    distance = np.abs(np.abs(v)[:, :, None] / safe[:, :, None] - grid)
    near = distance.argmin(2)
    after = np.minimum(near + 1, 7)
    tie = np.take_along_axis(distance, near[..., None], 2) == np.take_along_axis(distance, after[..., None], 2)
    near = np.where(tie[..., 0] & (near % 2 == 1), after, near)  # ties to the even code
    return (np.sign(v) * grid[near] * sf[:, None] * scale).reshape(np.shape(values))


def expected(weights, x, ids, scales, *, alpha1, alpha2, inter_scale=None, activation=swiglu, first=0):
    """The routed layer in f64: x as it enters gemm1; alphas multiply sums of code * scale products."""
    out = np.zeros((len(x), H))
    for t, p in np.ndindex(*ids.shape):
        e = int(ids[t, p]) - first
        if not 0 <= e < len(weights.dense["up"]):
            continue
        gate = alpha1[e] * (weights.dense["gate"][e] @ x[t])
        up = alpha1[e] * (weights.dense["up"][e] @ x[t])
        y = activation(gate, up)
        y = bf16(y) if inter_scale is None else through_nvfp4(y, inter_scale) / inter_scale
        out[t] += float(scales[t, p]) * alpha2[e] * (weights.dense["down"][e] @ y)
    return out


class CuteDsl(unittest.TestCase):
    def test_signature(self):
        parameters = inspect.signature(face.cute_dsl_fused_moe_nvfp4).parameters
        self.assertEqual(list(parameters), (
            "x x_sf token_selected_experts token_final_scales w1_weight w1_weight_sf w1_alpha fc2_input_scale w2_weight "
            "w2_weight_sf w2_alpha num_experts top_k num_local_experts local_expert_offset output_dtype "
            "use_fused_finalize moe_output aux_stream enable_pdl activation_type swiglu_alpha swiglu_beta swiglu_limit "
            "situ_beta situ_linear_beta quant_mode per_token_scale").split())
        self.assertEqual(parameters["quant_mode"].kind, inspect.Parameter.KEYWORD_ONLY)
        self.assertEqual(list(inspect.signature(face.CuteDslMoEWrapper).parameters), (
            "num_experts top_k hidden_size intermediate_size use_cuda_graph max_num_tokens num_local_experts "
            "local_expert_offset tile_size sf_vec_size output_dtype device enable_pdl activation_type swiglu_alpha "
            "swiglu_beta swiglu_limit situ_beta situ_linear_beta use_fused_finalize quant_mode").split())

    def w4a16(self, weights, x, ids, scales, **options):
        options = {"num_experts": E, "top_k": K, "quant_mode": "w4a16", **options}
        return face.cute_dsl_fused_moe_nvfp4(x, None, ids, scales, weights.w1, weights.w1_sf, weights.alpha1, None,
                                             weights.w2, weights.w2_sf, weights.alpha2, **options)

    def test_w4a16(self):
        weights = Weights()
        x, ids, scales = tokens()
        found = self.w4a16(weights, x, ids, scales)
        self.assertEqual((found.shape, found.dtype), ((T, H), torch.bfloat16))
        want = expected(weights, x.double().numpy(), ids, scales, alpha1=weights.alpha1.numpy(),
                        alpha2=weights.alpha2.numpy())
        self.assertLess(relative_l2(found.float(), want), 3e-3)

    def test_each_activation(self):
        x, ids, scales = tokens()
        clamp = lambda g, u: (np.clip(u, -2, 2) + 0.5) * np.minimum(g, 2) * sigmoid(1.3 * np.minimum(g, 2))  # noqa: E731
        tanh = lambda g, u: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3))) * u  # noqa: E731
        relu2 = lambda g, u: np.maximum(u, 0) ** 2  # noqa: E731
        for options, activation in (
                ({"swiglu_alpha": 1.3, "swiglu_beta": 0.5, "swiglu_limit": 2.0}, clamp),
                ({"activation_type": 8}, tanh), ({"activation_type": 6}, relu2)):
            weights = Weights(gated=activation is not relu2)
            want = expected(weights, x.double().numpy(), ids, scales, alpha1=weights.alpha1.numpy(),
                            alpha2=weights.alpha2.numpy(), activation=activation)
            self.assertLess(relative_l2(self.w4a16(weights, x, ids, scales, **options).float(), want), 4e-3, options)

    def test_local_experts_and_ids_of_nobody(self):
        weights = Weights(experts=2)
        x, ids, scales = tokens()
        ids[0] = torch.tensor([-1, E, 3])
        found = self.w4a16(weights, x, ids, scales, num_local_experts=2, local_expert_offset=3)
        want = expected(weights, x.double().numpy(), ids, scales, alpha1=weights.alpha1.numpy(),
                        alpha2=weights.alpha2.numpy(), first=3)
        self.assertLess(relative_l2(found.float(), want), 3e-3)

    def w4a4(self, weights, x, ids, scales, multiplier, **options):
        codes, sf, _ = fourmoe.quantize(x.float(), global_scale=1.0)
        found = face.cute_dsl_fused_moe_nvfp4(
            codes, sf.view(torch.float8_e4m3fn)[..., None], ids, scales, weights.w1, weights.w1_sf, weights.alpha1,
            torch.tensor([multiplier]), weights.w2, weights.w2_sf, weights.alpha2 / multiplier, E, K, **options)
        return fourmoe.decode(codes, sf).double().numpy(), found

    def test_w4a4(self):
        weights = Weights()
        x, ids, scales = tokens()
        for multiplier in (1.0, 37.0, 0.25):
            decoded, found = self.w4a4(weights, x, ids, scales, multiplier)
            want = expected(weights, decoded, ids, scales, alpha1=weights.alpha1.numpy(),
                            alpha2=weights.alpha2.numpy() / multiplier, inter_scale=1 / multiplier)
            # Blocks whose scale rounds to 0 upstream, and to the smallest scale here, differ at a multiplier below 1.
            self.assertLess(relative_l2(found.float(), want), 1e-2, multiplier)

    def test_no_tokens(self):
        weights = Weights()
        x, ids, scales = (tensor[:0] for tensor in tokens())
        self.assertEqual(self.w4a4(weights, x, ids, scales, 1.0)[1].shape, (0, H))
        self.assertEqual(self.w4a16(weights, x, ids, scales).shape, (0, H))

    def test_w2_alpha_must_carry_the_inverse_of_the_multiplier(self):
        weights = Weights()
        call = tokens()
        _, one = self.w4a4(weights, *call, 1.0)
        weights.alpha2 = weights.alpha2 * 8
        _, same = self.w4a4(weights, *call, 8.0)  # passes alpha2 / 8, that is the first alpha2
        self.assertLess(relative_l2(same.float(), 8 * one.float()), 0.15)  # not one: the multiplier is not undone

    def test_output_is_overwritten(self):
        weights = Weights()
        x, ids, scales = tokens()
        out = torch.full((T + 2, H), torch.nan, dtype=torch.float16)
        found = self.w4a16(weights, x, ids, scales, moe_output=out)
        self.assertEqual(found.data_ptr(), out.data_ptr())
        self.assertFalse(found.isnan().any())
        self.assertTrue(out[T:].isnan().all())
        torch.testing.assert_close(found.float(), self.w4a16(weights, x, ids, scales, output_dtype=torch.float32),
                                   rtol=2e-3, atol=2e-3)

    def test_wrong_layouts_are_noticed(self):
        x, ids, scales = tokens()
        weights = Weights()
        want = self.w4a16(weights, x, ids, scales).float()
        halves = Weights(group=0)
        self.assertGreater(relative_l2(self.w4a16(halves, x, ids, scales).float(), want), 0.1)
        weights.w1_sf = weights.w1_sf.transpose(0, 1).contiguous().view_as(weights.w1_sf)
        self.assertGreater(relative_l2(self.w4a16(weights, x, ids, scales).float(), want), 0.05)

    def test_wrapper(self):
        weights = Weights()
        x, ids, scales = tokens()
        moe = face.CuteDslMoEWrapper(E, K, H, I, quant_mode="w4a16", device="cpu")
        found = moe.run(x, None, ids, scales, weights.w1, weights.w1_sf, weights.alpha1, None, weights.w2, weights.w2_sf,
                        weights.alpha2)
        torch.testing.assert_close(found, self.w4a16(weights, x, ids, scales), rtol=0, atol=0)

    def test_weights_are_packed_once_and_again_when_changed(self):
        weights = Weights()
        call = tokens()
        before = self.w4a16(weights, *call)
        entries = len(face._cache.layers)
        torch.testing.assert_close(self.w4a16(weights, *call), before, rtol=0, atol=0)
        self.assertEqual(len(face._cache.layers), entries)
        weights.alpha2.mul_(2)
        torch.testing.assert_close(self.w4a16(weights, *call), before * 2, rtol=0, atol=0)
        self.assertEqual(len(face._cache.layers), entries)
        weights.w2.data = Weights(seed=5).w2  # the same object, of other memory
        fresh = Weights()
        fresh.w2, fresh.alpha2 = weights.w2.clone(), weights.alpha2.clone()
        torch.testing.assert_close(self.w4a16(weights, *call), self.w4a16(fresh, *call), rtol=0, atol=0)
        del weights, fresh
        gc.collect()
        self.assertEqual(len(face._cache.layers), entries - 1)

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            weights = Weights()
            found = self.w4a16(weights, *tokens())
        torch.testing.assert_close(found.clone(), self.w4a16(Weights(), *tokens()), rtol=0, atol=0)

    def test_arguments_are_named_as_here(self):
        x, ids, scales = tokens()
        codes, sf, _ = fourmoe.quantize(x.float(), global_scale=1.0)

        def call(**changed):
            weights = Weights()
            for name, change in changed.items():
                setattr(weights, name, change(getattr(weights, name)))
            return self.w4a16(weights, x, ids, scales)

        def w4a4(x_sf):
            weights = Weights()
            return face.cute_dsl_fused_moe_nvfp4(codes, x_sf, ids, scales, weights.w1, weights.w1_sf, weights.alpha1,
                                                 torch.ones(1), weights.w2, weights.w2_sf, weights.alpha2, E, K)

        for words, refused in [
            (r"w2_weight is \[64, 192\], expected \[128, 192\] to go with w1_weight", lambda: call(w2=lambda w: w[:, :64])),
            ("w2_weight is for 3 experts, w1_weight for 6", lambda: call(w2=lambda w: w[:3])),
            ("w1_weight_sf has 5 dimensions", lambda: call(w1_sf=lambda s: s[..., 0])),
            ("w1_weight_sf is for 128 rows and 128 columns", lambda: call(w1_sf=lambda s: s[:, :, :1])),
            (r"w1_alpha is \[3\], expected \[1\] or \[6\]", lambda: call(alpha1=lambda a: a[:3])),
            (r"x_sf is \[19, 7\], expected \[19, 8\]", lambda: w4a4(sf[:, :7])),
            ("moe_output shares memory with x", lambda: self.w4a16(Weights(), x, ids, scales, moe_output=x)),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, "^" + words):
                refused()

    def test_refusals(self):
        weights = Weights()
        x, ids, scales = tokens()
        for kind, words, options in [
            (ValueError, "quant_mode must be 'nvfp4'/'w4a4' or 'w4a16'", {"quant_mode": "w8"}),
            (ValueError, "x_sf and fc2_input_scale are needed", {"quant_mode": "w4a4"}),
            (ValueError, "Unsupported activation_type 2", {"activation_type": 2}),
            (NotImplementedError, "SiTU is not computed", {"situ_beta": 1.0}),
            (ValueError, "w1_weight is for 6 experts, expected 5", {"num_experts": 5}),
            (ValueError, r"token_selected_experts is \[19, 3\], expected \[19, 2\]", {"top_k": 2}),
            (ValueError, r"^moe_output is \[19, 64\]", {"moe_output": torch.empty(T, 64)}),
        ]:
            with self.subTest(words), self.assertRaisesRegex(kind, words):
                self.w4a16(weights, x, ids, scales, **options)
        weights.alpha1[2] = -1
        with self.assertRaisesRegex(ValueError, "w1_alpha, expert 2, is -1, expected finite and above 0"):
            self.w4a16(weights, x, ids, scales)


class B12x(unittest.TestCase):
    def run_b12x(self, weights, x, ids, scales, alpha2=None, **options):
        return face.b12x_fused_moe(x, weights.w1, weights.w1_sf, weights.w2, weights.w2_sf, ids, scales, E, K,
                                   w1_alpha=weights.alpha1, w2_alpha=weights.alpha2 if alpha2 is None else alpha2, **options)

    def test_signature(self):
        self.assertEqual(list(inspect.signature(face.b12x_fused_moe).parameters), (
            "x w1_weight w1_weight_sf w2_weight w2_weight_sf token_selected_experts token_final_scales num_experts top_k "
            "w1_alpha w2_alpha fc2_input_scale input_global_scale num_local_experts output output_dtype activation "
            "swiglu_alpha swiglu_beta swiglu_limit activation_precision quant_mode source_format").split())

    def test_w4a16(self):
        weights = Weights(group=0)
        x, ids, scales = tokens()
        want = expected(weights, x.double().numpy(), ids, scales, alpha1=weights.alpha1.numpy(),
                        alpha2=weights.alpha2.numpy())
        found = self.run_b12x(weights, x, ids, scales, quant_mode="w4a16")
        self.assertLess(relative_l2(found.float(), want), 3e-3)
        weights.alpha1, weights.alpha2 = 1 / weights.alpha1, 1 / weights.alpha2
        inverse = self.run_b12x(weights, x, ids, scales, activation_precision="bf16", source_format="compressed_tensors")
        torch.testing.assert_close(inverse, found, rtol=1e-2, atol=1e-4)

    def test_nvfp4_with_its_own_input_scale(self):
        weights = Weights(group=0)
        x, ids, scales = tokens()
        for scale, inter in ((1.0, 1.0), (0.5, 0.125)):
            decoded = through_nvfp4(x.double().numpy(), scale)
            want = expected(weights, decoded, ids, scales, alpha1=weights.alpha1.numpy(),
                            alpha2=weights.alpha2.numpy() * inter, inter_scale=inter)
            found = self.run_b12x(weights, x, ids, scales, weights.alpha2 * inter, fc2_input_scale=torch.tensor([inter]),
                                  input_global_scale=torch.full((E,), scale))
            self.assertLess(relative_l2(found.float(), want), 2e-2, scale)

    def test_nvfp4_where_alpha_serves_both(self):
        weights = Weights(group=0)
        x, ids, scales = tokens()
        weights.alpha1 = torch.full((E,), 0.0078125)
        want = expected(weights, through_nvfp4(x.double().numpy(), 0.0078125), ids, scales, alpha1=np.ones(E),
                        alpha2=weights.alpha2.numpy(), inter_scale=1.0)
        found = self.run_b12x(weights, x, ids, scales, fc2_input_scale=torch.tensor([1.0]))
        self.assertLess(relative_l2(found.float(), want), 2e-2)

    def test_activations_and_wrapper(self):
        weights = Weights(group=0)
        x, ids, scales = tokens()
        oai = lambda g, u: (u + 1) * g * sigmoid(1.702 * g)  # noqa: E731
        want = expected(weights, x.double().numpy(), ids, scales, alpha1=weights.alpha1.numpy(),
                        alpha2=weights.alpha2.numpy(), activation=oai)
        moe = face.B12xMoEWrapper(E, K, H, I, use_cuda_graph=True, max_num_tokens=T, device="cpu", quant_mode="w4a16",
                                  activation="swigluoai_uninterleave")
        found = moe.run(x, weights.w1, weights.w1_sf, weights.w2, weights.w2_sf, ids, scales, w1_alpha=weights.alpha1,
                        w2_alpha=weights.alpha2)
        self.assertLess(relative_l2(found.float(), want), 4e-3)
        with self.assertRaisesRegex(ValueError, r"num_tokens \(38\) exceeds max_num_tokens \(19\)"):
            moe.run(x.repeat(2, 1), weights.w1, weights.w1_sf, weights.w2, weights.w2_sf, ids.repeat(2, 1),
                    scales.repeat(2, 1), w1_alpha=weights.alpha1, w2_alpha=weights.alpha2)

    def test_refusals(self):
        weights = Weights(group=0)
        call = (weights, *tokens())
        for kind, words, options in [
            (ValueError, "fc2_input_scale is required when quant_mode='nvfp4'", {}),
            (NotImplementedError, "quant_mode='mxfp4'", {"quant_mode": "mxfp4"}),
            (ValueError, "only supports output_dtype", {"output_dtype": torch.float32}),
            (ValueError, "requires quant_mode='w4a16'", {"source_format": "ct", "fc2_input_scale": torch.ones(1)}),
            (NotImplementedError, "all 6 experts", {"num_local_experts": 3, "quant_mode": "w4a16"}),
            (ValueError, "activation is 'gelu', expected one of silu", {"activation": "gelu", "quant_mode": "w4a16"}),
        ]:
            with self.subTest(words), self.assertRaisesRegex(kind, words):
                self.run_b12x(*call, **options)


class OnAGpu(unittest.TestCase):
    """The same calls with the same tensors on a GPU: results of the CPU, whose arithmetic the classes above check."""

    def setUp(self):
        if not torch.cuda.is_available():
            self.skipTest("no GPU here")
        try:
            fourmoe.pack(up=torch.zeros(1, 16, 16).bfloat16(), down=torch.zeros(1, 16, 16).bfloat16(), top_k=1,
                         activation="relu2", device="cuda:0")
        except fourmoe.UnavailableError as error:
            self.skipTest(str(error))

    def agree(self, name, arguments, options, bound):
        """Bitwise equal from call to call, and within the bound of the CPU."""
        def call(device):
            moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
            named = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
            return getattr(face, name)(*moved, **named)

        host, device = call("cpu"), call("cuda")
        self.assertEqual((device.device.type, device.dtype), ("cuda", host.dtype))
        self.assertLess(relative_l2(device.float().cpu(), host.float()), bound, (name, options))

    def cute_dsl(self, weights, mode, **options):
        x, ids, scales = tokens()
        ids[0] = torch.tensor([-1, E, 3])
        sf = multiplier = None
        alpha2 = weights.alpha2
        if mode == "w4a4":
            x, sf, _ = fourmoe.quantize(x.float(), global_scale=1.0)
            sf, multiplier = sf.view(torch.float8_e4m3fn)[..., None], torch.tensor([37.0])
            alpha2 = alpha2 / 37.0
        arguments = [x, sf, ids, scales, weights.w1, weights.w1_sf, weights.alpha1, multiplier, weights.w2,
                     weights.w2_sf, alpha2, E, K]
        self.agree("cute_dsl_fused_moe_nvfp4", arguments, {"quant_mode": mode, **options}, 1e-2 if multiplier else 4e-3)

    def test_cute_dsl(self):
        for mode in ("w4a16", "w4a4"):
            self.cute_dsl(Weights(), mode)
            self.cute_dsl(Weights(), mode, swiglu_alpha=1.3, swiglu_beta=0.5, swiglu_limit=2.0)
            self.cute_dsl(Weights(gated=False), mode, activation_type=6)
            self.cute_dsl(Weights(experts=2), mode, num_local_experts=2, local_expert_offset=3)

    def test_b12x(self):
        x, ids, scales = tokens()
        weights = Weights(group=0)
        arguments = [x, weights.w1, weights.w1_sf, weights.w2, weights.w2_sf, ids, scales, E, K]
        alphas = {"w1_alpha": weights.alpha1, "w2_alpha": weights.alpha2}
        self.agree("b12x_fused_moe", arguments, {**alphas, "quant_mode": "w4a16"}, 4e-3)
        self.agree("b12x_fused_moe", arguments, {**alphas, "activation": "gelu_tanh", "fc2_input_scale": torch.tensor([0.125]),
                                                 "input_global_scale": torch.full((E,), 0.5)}, 2e-2)

    def test_wrappers_in_a_graph_follow_tokens_and_routing(self):
        weights = Weights(group=0)
        for tensor in ("w1", "w1_sf", "w2", "w2_sf", "alpha1", "alpha2"):
            setattr(weights, tensor, getattr(weights, tensor).cuda())
        moe = face.B12xMoEWrapper(E, K, H, I, use_cuda_graph=True, max_num_tokens=T, quant_mode="w4a16")
        x, ids, scales = (tensor.cuda() for tensor in tokens())

        def run(x, ids, scales):
            return moe.run(x, weights.w1, weights.w1_sf, weights.w2, weights.w2_sf, ids, scales, w1_alpha=weights.alpha1,
                           w2_alpha=weights.alpha2)

        run(x, ids, scales)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x, ids, scales)
        for seed in range(2, 8):
            fresh = [tensor.cuda() for tensor in tokens(seed=seed)]
            for old, new in zip((x, ids, scales), fresh):
                old.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            found = out.clone()
            self.assertTrue(torch.equal(found, run(*fresh)))


if __name__ == "__main__":
    unittest.main()
