#!/usr/bin/env python3
"""Layers on a GPU with torch's CUDA tensors: results, streams, memory, graphs, compilation, refits, refusals, threads."""
import os
import statistics
import sys
import threading
import unittest

from package import SOURCE, TINY, Packed, fourmoe, np, relative_l2, require

torch = require("torch")
import fourmoe.torch  # noqa: E402

BOUND = {"w4a16": 5e-4, "w4a4": 1e-2}  # against the CPU: sums in another order, then the intermediate's rounding
PACKED = Packed(hidden=128, inter=80, experts=16, top_k=4)


def skip(reason):
    print(f"skipped: {reason}", file=sys.stderr)
    sys.exit(77)


if not torch.cuda.is_available():
    skip("no GPU here")
try:
    fourmoe.pack(**PACKED.arguments, device="cuda:0")
except fourmoe.UnavailableError as missing:
    skip(missing)


def pack(device="cuda:0", **options):
    return fourmoe.pack(**PACKED.arguments, device=device, **options)


def tokens(count, dtype=torch.bfloat16):
    x, ids, weights = (torch.from_numpy(array).cuda() for array in PACKED.tokens(count))
    return x.to(dtype), ids, weights


def on_cpu(call):
    return tuple(tensor.cpu() for tensor in call)


def capture(call):
    """A graph of one call, after it has run once outside of the capture."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay(graph, out):
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return out.clone()


class Results(unittest.TestCase):
    def test_every_type_agrees_with_the_cpu(self):
        for precision, bound in BOUND.items():
            layers = pack(precision=precision), pack("cpu", precision=precision)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for count in (1, 8, 61):
                    call = tokens(count, dtype)
                    found = layers[0](*call)
                    self.assertEqual((found.dtype, found.device.type, found.shape), (dtype, "cuda", (count, 128)))
                    wide = layers[0](*call, out=torch.empty(count, 128, device="cuda"))
                    torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0)
                    expected = layers[1](*on_cpu(call), out=torch.empty(count, 128))
                    self.assertLess(relative_l2(wide.cpu(), expected), bound, (precision, dtype, count))

    def test_against_numpy(self):
        x, ids, weights = PACKED.tokens(37)
        call = (torch.from_numpy(array).cuda() for array in (x, ids, weights))
        self.assertLess(relative_l2(pack()(*call).cpu(), PACKED.expected(x, ids, weights)), 5e-4)

    def test_swapped_gate_and_up_is_noticed(self):
        swapped = dict(PACKED.arguments)
        for part in ("", "_scale", "_global"):
            swapped[f"gate{part}"], swapped[f"up{part}"] = swapped[f"up{part}"], swapped[f"gate{part}"]
        call = tokens(8)
        wrong = fourmoe.pack(**swapped, device="cuda")(*call)
        self.assertGreater(relative_l2(wrong.float().cpu(), pack()(*call).float().cpu()), 0.1)

    def test_legal_inputs(self):
        layer = pack()
        x, ids, weights = tokens(9)
        expected = layer(x, ids, weights)
        same = [("long ids, bf16 weights", (x, ids.long(), weights.bfloat16())),
                ("strided rows", (torch.cat([x, x], 1)[:, 128:], ids, weights))]
        for name, call in same:
            bound = 3e-3 if call[2].dtype == torch.bfloat16 else 0
            self.assertLessEqual(relative_l2(layer(*call).float().cpu(), expected.float().cpu()), bound, name)
        self.assertEqual(layer(x[:0], ids[:0], weights[:0]).shape, (0, 128))
        none = ids.clone()
        none[:, 1:] = -1
        weights0 = weights.clone()
        weights0[:, 1:] = 0
        torch.testing.assert_close(layer(x, none, weights), layer(x, ids, weights0))
        duplicate = ids[:, :1].expand(-1, 4).contiguous()
        once = torch.where(torch.arange(4, device="cuda") == 0, weights.sum(1, keepdim=True), 0).contiguous()
        torch.testing.assert_close(layer(x, duplicate, weights), layer(x, duplicate, once))

    def test_out_is_overwritten_and_rows_beyond_are_not_touched(self):
        layer = pack(max_tokens=16)
        call = tokens(37)  # more than one pass
        out = torch.full((40, 128), 7, dtype=torch.bfloat16, device="cuda")
        self.assertIs(layer(*call, out=out), out)
        torch.testing.assert_close(out[:37], layer(*call), rtol=0, atol=0)
        self.assertTrue((out[37:] == 7).all())

    def test_logits_and_the_layers_own_router(self):
        router = PACKED.random.standard_normal((16, 128)).astype(np.float32)
        layer = fourmoe.pack(**PACKED.arguments, router=router, device="cuda")
        x = tokens(9)[0]
        logits = x.double() @ torch.from_numpy(router).cuda().double().T
        ids, weights = (array.cuda() for array in fourmoe.route(logits.float().cpu(), top_k=4))
        torch.testing.assert_close(layer(x), layer(x, ids, weights), rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(layer(x, router_logits=logits.float()), layer(x, ids, weights), rtol=2e-2, atol=1e-3)

    def test_bits_do_not_change_from_run_to_run(self):
        for precision in BOUND:
            layer = pack(precision=precision)
            call = tokens(61)
            first = layer(*call)
            for _ in range(20):
                self.assertTrue(torch.equal(layer(*call), first))

    def test_checkpoints_of_each_encoding(self):
        for path, precisions in ((TINY / "nvfp4", ("w4a16", "w4a4")), (TINY / "bf16", ("w4a16",)),
                                 (SOURCE / "tests" / "fixtures" / "gpt-oss-mxfp4", ("w4a16",))):
            for precision in precisions:
                host, device = (fourmoe.load(path, layer=0, device=where, precision=precision)
                                for where in ("cpu", "cuda:0"))
                x = torch.randn(21, host.hidden).bfloat16()
                ids = torch.rand(21, host.experts).topk(host.top_k).indices.int()
                weights = torch.rand(21, host.top_k)
                expected = host(x, ids, weights, out=torch.empty(21, host.hidden))
                found = device(x.cuda(), ids.cuda(), weights.cuda(), out=torch.empty(21, host.hidden, device="cuda"))
                self.assertLess(relative_l2(found.cpu(), expected), BOUND[precision], (path.name, precision))


class QuantisedTokens(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        scale = np.array([0.002], np.float32)
        cls.layers = [pack(where, precision="w4a4", input_scale=scale) for where in ("cpu", "cuda:0")]
        x, ids, weights = PACKED.tokens(40)
        codes, scales, _ = fourmoe.quantize(x, global_scale=0.002)
        cls.values = tuple(torch.from_numpy(array).cuda() for array in (x, ids, weights))
        cls.codes, cls.scales = torch.from_numpy(codes).cuda(), torch.from_numpy(scales).cuda()

    def run_codes(self, codes, scales, **options):
        return self.layers[1](codes, *self.values[1:], hidden_scales=scales, **options)

    def test_give_the_bits_of_tokens_that_the_layer_quantises(self):
        expected = self.layers[1](*self.values)
        found = self.run_codes(self.codes, self.scales, out=torch.empty_like(expected))
        self.assertTrue(torch.equal(found, expected))
        half = self.run_codes(self.codes, self.scales.view(torch.float8_e4m3fn))
        self.assertEqual(half.dtype, torch.bfloat16)
        self.assertTrue(torch.equal(half, expected.bfloat16()))

    def test_codes_of_any_other_quantiser(self):
        odd = self.codes & 0x66
        found = self.run_codes(odd, self.scales, out=torch.empty(40, 128, device="cuda"))
        arguments = on_cpu((odd, *self.values[1:]))
        expected = self.layers[0](*arguments, hidden_scales=self.scales.cpu(), out=torch.empty(40, 128))
        self.assertLess(relative_l2(found.cpu(), expected), 1e-2)

    def test_a_bad_scale_is_raised_by_wait_and_by_the_next_call(self):
        expected = self.run_codes(self.codes, self.scales)
        bad = self.scales.clone()
        bad[5, 2] = 0xFF
        words = r"hidden_scales\[5, 2\] is 0xff: NaN or negative"
        out = self.run_codes(self.codes, bad)
        with self.assertRaisesRegex(fourmoe.ArgumentError, words):
            self.layers[1].wait()
        self.assertTrue(out[5].isnan().all())
        self.assertTrue(torch.equal(out[6:], expected[6:]) and torch.equal(out[:5], expected[:5]))
        self.run_codes(self.codes, bad)
        torch.cuda.synchronize()
        with self.assertRaisesRegex(fourmoe.ArgumentError, words + ".*found by an earlier call; this one did nothing"):
            self.run_codes(self.codes, self.scales)
        self.assertTrue(torch.equal(self.run_codes(self.codes, self.scales), expected))

    def test_in_a_graph(self):
        codes, scales = self.codes.clone(), self.scales.clone()
        out = torch.empty(40, 128, device="cuda")
        workspace = torch.empty(self.layers[1].workspace_bytes(), dtype=torch.uint8, device="cuda")
        graph = capture(lambda: self.run_codes(codes, scales, out=out, workspace=workspace))
        codes.copy_(self.codes.flip(0))
        scales.copy_(self.scales.flip(0))
        found = replay(graph, out)
        self.assertTrue(torch.equal(found, self.run_codes(codes, scales, out=torch.empty_like(out))))

    def test_refusals(self):
        for words, call in [
            ("hidden_scales is on cpu, expected cuda:0", lambda: self.run_codes(self.codes, self.scales.cpu())),
            (r"hidden_scales is \[40, 7\], expected \[40, 8\]", lambda: self.run_codes(self.codes, self.scales[:, :7])),
            ("w4a4 without routing weights", lambda: self.run_codes(self.codes, self.scales, precision="w4a16")),
            ("hidden_states begins 1 bytes after a multiple of 4",
             lambda: self.run_codes(torch.cat([self.codes] * 2, 1)[:, 1:65], self.scales)),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()


class Streams(unittest.TestCase):
    def delayed(self, run, stream):
        """The result of a call whose tokens arrive on the stream after some 25 ms."""
        x, ids, weights = tokens(8)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            later = torch.zeros_like(x)
            torch.cuda._sleep(50_000_000)
            later.copy_(x)
        found = run(later, ids, weights)
        stream.synchronize()
        torch.testing.assert_close(found, pack()(x, ids, weights), rtol=0, atol=0)

    def test_the_current_stream_is_used(self):
        layer, stream = pack(), torch.cuda.Stream()

        def run(*call):
            with torch.cuda.stream(stream):
                return layer(*call)

        self.delayed(run, stream)

    def test_a_stream_that_is_given(self):
        layer, stream = pack(), torch.cuda.Stream()
        for given in (stream, stream.cuda_stream):
            self.delayed(lambda *call: layer(*call, stream=given), stream)  # noqa: B023
        with self.assertRaisesRegex(fourmoe.ArgumentError, "stream is str, expected an integer or a stream object"):
            layer(*tokens(1), stream="0")

    def test_temporaries_may_be_freed_at_once(self):
        layer = pack()
        x, ids, weights = tokens(300)
        expected = layer(x, ids, weights)
        for _ in range(50):
            found = layer(x * 1, ids + 0, weights * 1)
            torch.full_like(x, torch.nan)  # takes their memory
        self.assertTrue(torch.equal(found, expected))


def kept_bytes(work):
    """What work() takes of the card's memory and does not give back: the median of five, for others use the card, too."""
    kept = []
    for _ in range(5):
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        work()
        torch.cuda.synchronize()
        kept.append(before - torch.cuda.mem_get_info()[0])
    return statistics.median(kept)


class Memory(unittest.TestCase):
    def test_out_and_workspace_allocate_nothing(self):
        for precision in BOUND:
            layer = pack(precision=precision)
            call = tokens(61)
            out = torch.empty_like(call[0])
            workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")


            def use():
                for _ in range(20):
                    layer(*call, out=out, workspace=workspace)  # noqa: B023

            use()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            self.assertEqual(kept_bytes(use), 0)
            self.assertEqual(torch.cuda.memory_stats()["allocation.all.allocated"], before)

    def test_a_layer_frees_its_memory(self):
        def use():
            layer = fourmoe.load(TINY / "nvfp4", layer=0, device="cuda")
            layer(torch.zeros(4, 128, device="cuda"))
            layer.wait()

        use()
        self.assertLess(kept_bytes(lambda: [use() for _ in range(30)]), 8 << 20)  # 30 layers take 25 MiB and more


class Graphs(unittest.TestCase):
    def test_replays_follow_the_routing(self):
        for precision in BOUND:
            for count in (8, 40):
                layer = pack(precision=precision)
                x, ids, weights = tokens(count)
                out = torch.empty_like(x)
                workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")
                graph = capture(lambda: layer(x, ids, weights, out=out, workspace=workspace))  # noqa: B023
                for turn in range(20):
                    fresh = tokens(count)
                    if turn % 4 == 1:
                        fresh[1][:] = turn % 16  # all on one expert
                    if turn % 4 == 2:
                        fresh[1][::2] = -1
                    for old, new in zip((x, ids, weights), fresh):
                        old.copy_(new)
                    self.assertTrue(torch.equal(replay(graph, out), layer(*fresh)), (precision, count, turn))

    def test_a_capture_needs_a_workspace_or_a_call_before(self):
        layer = pack()
        call = tokens(8)
        graph = torch.cuda.CUDAGraph()
        with self.assertRaisesRegex(fourmoe.Error, "a captured call cannot make the layer's own workspace.*before the capture"):
            with torch.cuda.graph(graph):
                layer(*call)
        torch.cuda.synchronize()
        expected = layer(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*call)  # memory of the graph
        self.assertTrue(torch.equal(replay(graph, out), expected))

    def test_a_refit_keeps_the_addresses(self):
        other = Packed(hidden=128, inter=80, experts=16, top_k=4, seed=5)
        weights = {name: value for name, value in other.arguments.items() if name != "top_k"}
        for precision in BOUND:
            for count in (8, 40):
                layer = pack(precision=precision)
                call = tokens(count)
                out = torch.empty_like(call[0])
                workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")
                graph = capture(lambda: layer(*call, out=out, workspace=workspace))  # noqa: B023
                before = replay(graph, out)
                layer.refit(**weights)
                after = replay(graph, out)
                fresh = fourmoe.pack(**other.arguments, device="cuda", precision=precision)(*call)
                self.assertTrue(torch.equal(after, fresh))
                self.assertGreater(relative_l2(before.float().cpu(), fresh.float().cpu()), 0.1)


class Operators(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        router = PACKED.random.standard_normal((16, 128)).astype(np.float32)
        cls.layer = fourmoe.pack(**PACKED.arguments, router=router, device="cuda")
        cls.module = fourmoe.torch.Module(cls.layer)

    def test_operators_are_what_torch_expects(self):
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        x, ids, weights = tokens(5)
        torch.library.opcheck(torch.ops.fourmoe.run.default, (x, self.layer.handle, ids, weights), test_utils=checks)

    def block(self):
        scale = torch.randn(128, dtype=torch.bfloat16, device="cuda")
        return lambda x, ids, weights: torch.nn.functional.silu(self.module(x * scale, ids, weights)) + x

    def test_compile_without_graph_breaks(self):
        torch._dynamo.reset()
        block = self.block()
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        for count in (5, 9, 40):
            call = tokens(count)
            torch.testing.assert_close(compiled(*call), block(*call), rtol=2e-2, atol=2e-2)

    def test_compile_with_graphs(self):
        torch._dynamo.reset()
        block = self.block()
        compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
        for _ in range(6):  # runs, records, replays
            call = tokens(8)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(*call), block(*call), rtol=2e-2, atol=2e-2)


class Refusals(unittest.TestCase):
    def test_devices_are_named(self):
        layer, host = pack(), pack("cpu")
        x, ids, weights = tokens(4)
        wide = torch.zeros(4, 136, dtype=torch.bfloat16, device="cuda")
        for words, call in [
            ("hidden_states is on cpu, expected cuda:0, where the layer is", lambda: layer(x.cpu(), ids, weights)),
            ("hidden_states is on cuda:0, expected cpu, where the layer is", lambda: host(x, ids.cpu(), weights.cpu())),
            ("topk_ids is on cpu, expected cuda:0", lambda: layer(x, ids.cpu(), weights)),
            ("topk_weights is on cpu, expected cuda:0", lambda: layer(x, ids, weights.cpu())),
            ("router_logits is on cpu, expected cuda:0", lambda: layer(x, router_logits=torch.zeros(4, 16))),
            ("out is on cpu, expected cuda:0", lambda: layer(x, ids, weights, out=x.cpu())),
            ("workspace is 1-dimensional u8 on cpu, expected .* on cuda:0",
             lambda: layer(x, ids, weights, workspace=torch.empty(1 << 20, dtype=torch.uint8))),
            ("hidden_states begins 2 bytes after a multiple of 16", lambda: layer(wide[:, 1:129], ids, weights)),
            ("out shares memory with hidden_states", lambda: layer(x, ids, weights, out=x)),
            (r"gate is on cuda:0, expected cpu",
             lambda: fourmoe.pack(**{**PACKED.arguments, "gate": torch.from_numpy(PACKED.arguments["gate"]).cuda()})),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()
        with self.assertRaisesRegex(fourmoe.UnavailableError, "cuda:77 was asked for, this machine has"):
            pack("cuda:77")
        with self.assertRaisesRegex(fourmoe.ArgumentError, "backend cpu computes on the host"):
            pack(plan="cpu")

    def test_what_kernels_find_is_raised_by_wait_and_by_the_next_call(self):
        layer = pack()
        x, ids, weights = tokens(4)
        wrong = ids.clone()
        wrong[2, 1] = 16
        layer(x, wrong, weights)
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"topk_ids\[2, 1\] is 16, expected -1 to 15"):
            layer.wait()
        logits = torch.zeros(4, 16, device="cuda")
        logits[3, 0] = torch.nan
        found = layer(x, router_logits=logits)
        torch.cuda.synchronize()
        self.assertTrue(found[3].isnan().all() and not found[:3].isnan().any())
        with self.assertRaisesRegex(fourmoe.ArgumentError, "router_logits of token 3 .* earlier call; this one did nothing"):
            layer(x, ids, weights)
        layer(x, ids, weights)
        layer.wait()


class Threads(unittest.TestCase):
    def test_many_at_once(self):
        layer = pack(precision="w4a16")
        calls = [tokens(8 * seed + 5) for seed in range(6)]
        expected = [layer(*call) for call in calls]
        torch.cuda.synchronize()
        wrong = []

        def work(seed):
            own = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda") if seed % 2 else None
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                for turn in range(50):
                    found = layer(*calls[seed], workspace=own)
                    if turn % 10 == 9 and not torch.equal(found, expected[seed]):
                        wrong.append((seed, turn))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_a_refit_between_calls(self):
        layer = pack()
        x, ids, weights = tokens(40)
        other = Packed(hidden=128, inter=80, experts=16, top_k=4, seed=5)
        legal = [layer(x, ids, weights), fourmoe.pack(**other.arguments, device="cuda")(x, ids, weights)]
        torch.cuda.synchronize()
        wrong, done = [], threading.Event()

        def work():
            with torch.cuda.stream(torch.cuda.Stream()):
                while not done.is_set():
                    found = layer(x, ids, weights)
                    layer.wait()
                    if not any(torch.equal(found, one) for one in legal):
                        wrong.append(found)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(6):
            source = PACKED if turn % 2 else other
            layer.refit(**{name: value for name, value in source.arguments.items() if name != "top_k"})
        done.set()
        for thread in threads:
            thread.join()
        self.assertEqual(len(wrong), 0)


class OtherFrameworks(unittest.TestCase):
    def test_arrays_of_cupy(self):
        try:
            import cupy
        except ImportError:
            self.skipTest("no cupy here")
        layer = pack()
        x, ids, weights = PACKED.tokens(9)
        expected = layer(*(torch.from_numpy(array).cuda() for array in (x, ids, weights))).cpu().numpy()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            found = layer(cupy.asarray(x), cupy.asarray(ids), cupy.asarray(weights))
            self.assertIsInstance(found, cupy.ndarray)
            stream.synchronize()
            np.testing.assert_array_equal(cupy.asnumpy(found), expected)

    def test_arrays_of_jax(self):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory
        try:
            import jax
        except ImportError:
            self.skipTest("no jax here")
        if jax.default_backend() != "gpu":
            self.skipTest("jax has no GPU here")
        layer = pack()
        arrays = PACKED.tokens(9)
        for dtype, like in ((np.float32, torch.float32), (jax.numpy.bfloat16, torch.bfloat16)):
            x, ids, weights = (torch.from_numpy(array).cuda() for array in arrays)
            expected = layer(x.to(like), ids, weights).float().cpu().numpy()
            found = layer(jax.numpy.asarray(arrays[0], dtype), *map(jax.numpy.asarray, arrays[1:]))
            self.assertIsInstance(found, jax.Array)
            self.assertEqual((found.dtype, found.devices()), (dtype, {jax.devices()[0]}))
            np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


if __name__ == "__main__":
    unittest.main()
