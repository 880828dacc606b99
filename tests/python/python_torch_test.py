#!/usr/bin/env python3
"""torch tensors and operators on a CPU: types, views, refusals, torch.compile. On a GPU: torch_cuda_test.py."""
import importlib.util
import threading
import unittest

from package import SOURCE, Packed, fourmoe, np, require

torch = require("torch")
import fourmoe.torch  # noqa: E402


def tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


class Tensors(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.packed = Packed()
        arguments = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                     for name, value in cls.packed.arguments.items()}
        for name in ("gate_scale", "up_scale", "down_scale"):
            arguments[name] = arguments[name].view(torch.float8_e4m3fn)
        cls.arguments = arguments
        cls.layer = fourmoe.pack(**arguments)

    def test_torch_and_numpy_give_the_same_bits(self):
        arrays = self.packed.tokens(9)
        expected = fourmoe.pack(**self.packed.arguments)(*arrays)
        found = self.layer(*tensors(arrays))
        self.assertIsInstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), expected)

    def test_types_of_activations(self):
        x, ids, weights = tensors(self.packed.tokens(9))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = self.layer(x.to(dtype), ids.long(), weights.to(torch.bfloat16))
            self.assertEqual(found.dtype, dtype)
            wide = self.layer(x.to(dtype), ids, weights.bfloat16(), out=torch.empty(9, 64, dtype=torch.float32))
            torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0)

    def test_parameters_and_packed_float4(self):
        x, ids, weights = tensors(self.packed.tokens(3))
        dense = {name: torch.nn.Parameter(torch.from_numpy(value).bfloat16()) for name, value in self.packed.dense.items()}
        layer = fourmoe.pack(**dense, top_k=2)
        self.assertEqual(layer.encoding, "bf16")
        self.assertFalse(layer(x, ids, weights).requires_grad)
        arguments = dict(self.arguments)
        for name in ("gate", "up", "down"):
            arguments[name] = arguments[name].view(torch.float4_e2m1fn_x2)
        torch.testing.assert_close(fourmoe.pack(**arguments)(x, ids, weights), self.layer(x, ids, weights), rtol=0, atol=0)

    def test_strided_weights_need_no_copy(self):
        fused = torch.cat([self.arguments["gate"], self.arguments["up"]], 1)
        arguments = {**self.arguments, "gate": fused[:, :48], "up": fused[:, 48:]}
        every_other = torch.stack([self.arguments["gate"], self.arguments["up"]], 2).flatten(1, 2)
        interleaved = {**self.arguments, "gate": every_other[:, ::2], "up": every_other[:, 1::2]}
        call = tensors(self.packed.tokens(5))
        for changed in (arguments, interleaved):
            torch.testing.assert_close(fourmoe.pack(**changed)(*call), self.layer(*call), rtol=0, atol=0)

    def test_splits(self):
        call = tensors(self.packed.tokens(5))
        split = {name: list(value.split([3, 1, 4])) if isinstance(value, torch.Tensor) else value
                 for name, value in self.arguments.items()}
        torch.testing.assert_close(fourmoe.pack(**split)(*call), self.layer(*call), rtol=0, atol=0)

    def test_out_and_workspace_allocate_nothing(self):
        call = tensors(self.packed.tokens(5))
        out, workspace = torch.empty(5, 64), torch.empty(self.layer.workspace_bytes(), dtype=torch.uint8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.assertIs(self.layer(*call, out=out, workspace=workspace), out)
        self.assertEqual([event.name for event in profile.events() if event.cpu_memory_usage > 0], [])

    def test_no_gradient_passes(self):
        x, ids, weights = tensors(self.packed.tokens(4))
        self.assertFalse(self.layer(x.clone().requires_grad_(), ids, weights.clone().requires_grad_()).requires_grad)
        found = torch.ops.fourmoe.run(x.clone().requires_grad_(), self.layer.handle, ids, weights)
        with self.assertWarnsRegex(UserWarning, "fourmoe::run: an autograd kernel was not registered"):
            found.sum().backward()

    def test_tensors_without_memory(self):
        def freed(tensor):
            tensor = tensor.clone()
            tensor.untyped_storage().resize_(0)
            return tensor

        x, ids, weights = tensors(self.packed.tokens(4))
        routed = fourmoe.pack(**self.arguments, router=torch.randn(8, 64))  # which would pick where ids are not there
        workspace = torch.empty(self.layer.workspace_bytes(), dtype=torch.uint8)
        with torch._subclasses.FakeTensorMode():
            fake = torch.empty(4, 64)
        for name, call in [
            ("hidden_states", lambda: self.layer(freed(x), ids, weights)),
            ("hidden_states", lambda: self.layer(fake, ids, weights)),
            ("topk_ids", lambda: routed(x, freed(ids), freed(weights))),
            ("out", lambda: self.layer(x, ids, weights, out=freed(x))),
            ("workspace", lambda: self.layer(x, ids, weights, workspace=freed(workspace))),
            ("up", lambda: fourmoe.pack(**{**self.arguments, "up": freed(self.arguments["up"])})),
            ("up_global", lambda: fourmoe.pack(**{**self.arguments, "up_global": freed(self.arguments["up_global"])})),
            ("values", lambda: fourmoe.quantize(freed(x))),
            ("router_logits", lambda: fourmoe.route(freed(x), top_k=2)),
        ]:
            with self.subTest(name), self.assertRaisesRegex(fourmoe.ArgumentError, rf"^{name} is \[.*\] without memory"):
                call()

    def test_refusals_name_argument_and_device(self):
        x, ids, weights = tensors(self.packed.tokens(4))
        for words, call in [
            ("hidden_states is torch.Tensor, expected a tensor on cpu or cuda: Cannot pack tensors on meta", lambda: self.layer(x.to("meta"), ids, weights)),
            ("hidden_states has elements of a row 4 apart", lambda: self.layer(x.T.contiguous().T, ids, weights)),
            ("topk_weights is another type, expected f32, f16, bf16", lambda: self.layer(x, ids, weights.double())),
            (r"out is \[4, 32\], expected \[4, 64\]", lambda: self.layer(x, ids, weights, out=torch.empty(4, 32))),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()

    def test_threads(self):
        x, ids, weights = tensors(self.packed.tokens(16))
        expected = self.layer(x, ids, weights)
        wrong = []

        def work():
            for _ in range(50):
                if not torch.equal(self.layer(x, ids, weights), expected):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


class Overhead(unittest.TestCase):
    def test_of_a_call(self):
        spec = importlib.util.spec_from_file_location("python_overhead", SOURCE / "bench" / "python_overhead.py")
        bench = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bench)
        kept = bench.make_cases()
        cases = ("layer(...)", "layer(..., out, workspace)")
        table = bench.measure({name: kept[-1][name] for name in cases}, turns=9)
        self.assertLess(table["layer(...)"][0], bench.BAR)
        self.assertLess(table["layer(..., out, workspace)"][0], bench.BAR)


class Operators(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.packed = Packed()
        router = cls.packed.random.standard_normal((8, 64)).astype(np.float32)
        cls.layer = fourmoe.pack(**cls.packed.arguments, router=router)
        cls.module = fourmoe.torch.Module(cls.layer)

    def test_operators_are_what_torch_expects(self):
        x, ids, weights = tensors(self.packed.tokens(5))
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.fourmoe.run.default, (x, self.layer.handle, ids, weights), test_utils=checks)
        workspace = torch.empty(self.layer.workspace_bytes(), dtype=torch.uint8)
        torch.library.opcheck(torch.ops.fourmoe.run_out.default, (x, self.layer.handle, ids, weights),
                              {"out": torch.empty_like(x), "workspace": workspace}, test_utils=("test_faketensor",))

    def test_operator_with_out(self):
        x, ids, weights = tensors(self.packed.tokens(5))
        out = torch.full_like(x, 7)
        torch.ops.fourmoe.run_out(x, self.layer.handle, ids, weights, out=out)
        torch.testing.assert_close(out, self.layer(x, ids, weights), rtol=0, atol=0)

    def test_compile_without_graph_breaks(self):
        scale = torch.randn(64)

        def block(x, ids, weights):
            return torch.nn.functional.silu(self.module(x * scale, ids, weights)) + x

        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        for count in (5, 9, 2):
            call = tensors(self.packed.tokens(count))
            torch.testing.assert_close(compiled(*call), block(*call))

    def test_module_flattens_leading_dimensions(self):
        x = torch.randn(2, 3, 64)
        torch.testing.assert_close(self.module(x), self.layer(x.view(6, 64)).view(2, 3, 64), rtol=0, atol=0)

    def test_freed_layer(self):
        layer = fourmoe.pack(**self.packed.arguments)
        handle = layer.handle
        del layer
        with self.assertRaisesRegex(Exception, f"no layer has the handle {handle}"):
            torch.ops.fourmoe.run(torch.zeros(1, 64), handle)


if __name__ == "__main__":
    unittest.main()
