#!/usr/bin/env python3
"""Layers on a GPU packed and refitted from torch's CUDA tensors: the bits of those of host arrays, order, memory."""
import gc
import unittest
import weakref

from package import Packed, fourmoe, np, relative_l2, require

torch = require("torch")
from torch_cuda_test import BOUND, PACKED, capture, replay, tokens  # noqa: E402  (ends the program without a GPU)

NAMES = [f"{projection}{part}" for projection in ("gate", "up", "down") for part in ("", "_scale", "_global")]
OTHER = Packed(hidden=128, inter=80, experts=16, top_k=4, seed=5)


def weights_of(packed):
    return {name: packed.arguments[name] for name in NAMES}


def cuda(arguments):
    """The arrays as torch's tensors on the GPU, scales as float8_e4m3fn; all else as it is."""
    moved = {}
    for name, value in arguments.items():
        moved[name] = torch.from_numpy(value).cuda() if isinstance(value, np.ndarray) else value
        if name.endswith("_scale") and moved[name].dtype == torch.uint8:
            moved[name] = moved[name].view(torch.float8_e4m3fn)
    return moved


def with_everything(packed):
    """Biases of all types and scales of inputs too."""
    rng = np.random.default_rng(3)
    biases = {"gate_bias": rng.standard_normal((16, 80)).astype(np.float32),
              "up_bias": rng.standard_normal((16, 80)).astype(np.float16),
              "down_bias": rng.standard_normal((16, 128)).astype(np.float32)}
    return packed.arguments | biases | {"input_scale": np.full(1, 0.003, np.float32),
                                        "inter_scale": rng.uniform(0.002, 0.004, 16).astype(np.float32)}


def pack(arguments, **options):
    return fourmoe.pack(**arguments, device="cuda:0", **options)


class Pack(unittest.TestCase):
    def same(self, found, expected, call=None):
        call = call or tokens(37)
        self.assertTrue(torch.equal(found(*call), expected(*call)))

    def test_gives_the_bits_of_host_arrays(self):
        given = with_everything(PACKED)
        for precision in BOUND:
            expected = pack(given, precision=precision)
            self.same(pack(cuda(given), precision=precision), expected)
            bytes_too = {name: value.view(torch.uint8) if name in NAMES and name.endswith("_scale") else value
                         for name, value in cuda(given).items()}
            self.same(pack(bytes_too, precision=precision), expected)

    def test_biases_of_bfloat16(self):
        bias = torch.randn(16, 80).bfloat16()
        self.same(pack(cuda(PACKED.arguments) | {"up_bias": bias.cuda()}), pack(PACKED.arguments | {"up_bias": bias}))

    def test_against_numpy(self):
        x, ids, weights = PACKED.tokens(37)
        found = pack(cuda(PACKED.arguments))(*(torch.from_numpy(array).cuda() for array in (x, ids, weights)))
        self.assertLess(relative_l2(found.cpu(), PACKED.expected(x, ids, weights)), 5e-4)

    def test_lists_of_any_places(self):
        given = with_everything(PACKED)
        expected = pack(given, precision="w4a4")
        for turn, sizes in enumerate(([16], [1] * 16, [3, 13], [5, 1, 10])):
            split = {}
            for index, (name, value) in enumerate(given.items()):
                if not isinstance(value, np.ndarray) or len(value) == 1:
                    split[name] = value
                    continue
                pieces = [piece.copy() for piece in np.split(value, np.cumsum(sizes)[:-1])]
                split[name] = [torch.from_numpy(piece).cuda() if (index + turn + place) % 2 else piece
                               for place, piece in enumerate(pieces)]
            self.same(pack(split, precision="w4a4"), expected)

    def test_parts_in_different_places(self):
        given, there = PACKED.arguments, cuda(PACKED.arguments)
        for where in (NAMES[0::3], NAMES[1::3], NAMES[2::3], NAMES[:3], NAMES[3:4], NAMES[6:8]):
            with self.subTest(where):
                self.same(pack(given | {name: there[name] for name in where}), pack(given))

    def test_halves_of_a_fused_tensor_and_other_strides(self):
        there, expected = cuda(PACKED.arguments), pack(PACKED.arguments)
        halves = dict(there)
        for part in ("", "_scale"):
            gate, up = there[f"gate{part}"].view(torch.uint8), there[f"up{part}"].view(torch.uint8)
            fused = torch.cat([gate, up], 1)
            halves[f"gate{part}"], halves[f"up{part}"] = fused[:, :80], fused[:, 80:]
        self.same(pack(halves), expected)
        for part in ("", "_scale"):
            gate, up = there[f"gate{part}"].view(torch.uint8), there[f"up{part}"].view(torch.uint8)
            fused = torch.stack([gate, up], 2).flatten(1, 2)
            halves[f"gate{part}"], halves[f"up{part}"] = fused[:, ::2], fused[:, 1::2]
        globals_ = torch.stack([there["gate_global"], there["up_global"]], 1)
        halves["gate_global"], halves["up_global"] = globals_[:, 0], globals_[:, 1]
        self.same(pack(halves), expected)

    def test_dense_weights(self):
        given = {"top_k": 4, **{name: torch.from_numpy(value).bfloat16() for name, value in PACKED.dense.items()}}
        there = {name: value.cuda() if name != "top_k" else value for name, value in given.items()}
        self.same(pack(there), pack(given))
        self.same(pack({**there, "up": [there["up"][:5], given["up"][5:]]}), pack(given))

    def test_mxfp4(self):
        rng = np.random.default_rng(4)
        given = {"top_k": 4}
        for name, rows, columns in (("gate", 96, 128), ("up", 96, 128), ("down", 128, 96)):
            given[name] = rng.integers(0, 256, (16, rows, columns // 2), np.uint8)
            given[f"{name}_scale"] = rng.integers(114, 122, (16, rows, columns // 32), np.uint8)
        there = {name: torch.from_numpy(value).cuda() if name != "top_k" else value for name, value in given.items()}
        expected = pack(given)
        self.assertEqual(expected.encoding, "mxfp4")
        self.same(pack(there), expected)
        self.same(pack({**there, "up": given["up"], "down_scale": given["down_scale"]}), expected)

    def test_a_router_and_its_biases(self):
        rng = np.random.default_rng(5)
        own = {"router": rng.standard_normal((16, 128)).astype(np.float32),
               "router_bias": rng.standard_normal(16).astype(np.float32),
               "selection_bias": rng.standard_normal(16).astype(np.float32)}
        x = tokens(21)[0]
        layer = pack(cuda(PACKED.arguments | own), score="sigmoid")
        self.same(layer, pack(PACKED.arguments | own, score="sigmoid"), (x,))
        layer.refit(**cuda(weights_of(OTHER)))  # the router stays
        self.same(layer, pack(OTHER.arguments | own, score="sigmoid"), (x,))

    def test_arrays_of_cupy(self):
        try:
            import cupy
        except ImportError:
            self.skipTest("no cupy here")
        given = {name: cupy.asarray(value) if name != "top_k" else value for name, value in PACKED.arguments.items()}
        self.same(pack(given), pack(PACKED.arguments))


class Memory(unittest.TestCase):
    def test_tensors_may_be_freed_and_none_is_kept(self):
        call = tokens(37)
        expected = pack(PACKED.arguments)(*call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        there = cuda(PACKED.arguments)
        watches = [weakref.ref(value) for value in there.values() if isinstance(value, torch.Tensor)]
        held = torch.cuda.memory_allocated() - before
        layer = pack(there)
        del there
        gc.collect()
        self.assertEqual([watch() for watch in watches], [None] * len(watches))
        self.assertEqual(torch.cuda.memory_allocated(), before)
        torch.full((held,), 0xFF, dtype=torch.uint8, device="cuda")  # takes their memory
        for _ in range(8):
            torch.full((held // 8,), 0xFF, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
        self.assertTrue(torch.equal(layer(*call), expected))

    def test_refits_take_no_memory(self):
        layer = pack(PACKED.arguments)
        there = cuda(weights_of(OTHER))
        layer.refit(**there)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        for _ in range(30):
            layer.refit(**there)
        self.assertLess(before - torch.cuda.mem_get_info()[0], 4 << 20)

    def test_other_precisions_need_the_weights_once_more(self):
        call = tokens(9)
        layer = pack(cuda(PACKED.arguments))
        words = ("precision 'w4a4' and plan 'auto' are not the layer's, 'w4a16' and 'auto', and its weights lay in memory "
                 "of cuda:0, which it does not keep")
        for ask in (lambda: layer(*call, precision="w4a4"), lambda: layer.workspace_bytes(precision="w4a4")):
            with self.assertRaisesRegex(fourmoe.ArgumentError, words):
                ask()
        layer.refit(**weights_of(OTHER))  # of the host, and kept
        both = {precision: pack(OTHER.arguments, precision=precision)(*call) for precision in BOUND}
        for precision, expected in both.items():
            self.assertTrue(torch.equal(layer(*call, precision=precision), expected), precision)
        layer.refit(**cuda(weights_of(PACKED)))  # both are there by now
        for precision in BOUND:
            expected = pack(PACKED.arguments, precision=precision)(*call)
            self.assertTrue(torch.equal(layer(*call, precision=precision), expected), precision)


class Order(unittest.TestCase):
    def later(self, stream, source=PACKED):
        """Weights that arrive on the stream after some 25 ms; until then globals are 0, which would be refused."""
        there = cuda(source.arguments)
        late = {name: torch.zeros_like(value.view(torch.uint8)).view(value.dtype) for name, value in there.items()
                if name != "top_k"}
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for name, value in late.items():
                value.view(torch.uint8).copy_(there[name].view(torch.uint8))
        self.source = there  # which the stream reads
        return late

    def test_the_current_stream_is_waited_for(self):
        call = tokens(37)
        for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
            late = self.later(stream)
            with torch.cuda.stream(stream):
                layer = pack(late, top_k=4)
            self.assertTrue(torch.equal(layer(*call), pack(PACKED.arguments)(*call)))
            late = self.later(stream, OTHER)
            with torch.cuda.stream(stream):
                layer.refit(**late)
            self.assertTrue(torch.equal(layer(*call), pack(OTHER.arguments)(*call)))

    def test_a_stream_that_is_given_is_waited_for(self):
        call = tokens(37)
        stream = torch.cuda.Stream()
        for given in (stream, stream.cuda_stream):
            layer = pack(self.later(stream), top_k=4, stream=given)
            self.assertTrue(torch.equal(layer(*call), pack(PACKED.arguments)(*call)))
            layer.refit(**self.later(stream, OTHER), stream=given)
            self.assertTrue(torch.equal(layer(*call), pack(OTHER.arguments)(*call)))
        with self.assertRaisesRegex(fourmoe.ArgumentError, "stream is str, expected an integer or a stream object"):
            pack(cuda(PACKED.arguments), stream="0")

    def test_tensors_may_change_as_soon_as_they_are_packed(self):
        call = tokens(37)
        for _ in range(5):
            there = cuda(PACKED.arguments)
            layer = pack(there)
            for name, value in there.items():
                if name != "top_k":
                    value.view(torch.uint8).fill_(0xFF)
            self.assertTrue(torch.equal(layer(*call), pack(PACKED.arguments)(*call)))

    def test_calls_that_are_enqueued_compute_with_the_old_weights(self):
        x, ids, weights = tokens(300)
        layer, there = pack(PACKED.arguments, max_tokens=512), cuda(weights_of(OTHER))
        expected = layer(x, ids, weights)
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                found += [layer(x, ids, weights) for _ in range(5)]
        layer.refit(**there)
        torch.cuda.synchronize()
        for output in found:
            self.assertTrue(torch.equal(output, expected))
        self.assertFalse(torch.equal(layer(x, ids, weights), expected))

    def test_a_refit_between_replays(self):
        for precision in BOUND:
            for count in (8, 40):
                layer = pack(cuda(PACKED.arguments), precision=precision)
                call = tokens(count)
                out = torch.empty_like(call[0])
                workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")
                graph = capture(lambda: layer(*call, out=out, workspace=workspace))  # noqa: B023
                expected = [pack(packed.arguments, precision=precision)(*call) for packed in (PACKED, OTHER)]
                self.assertGreater(relative_l2(*(one.float().cpu() for one in expected)), 0.1)
                for turn in range(6):
                    self.assertTrue(torch.equal(replay(graph, out), expected[turn % 2]), (precision, count, turn))
                    other = weights_of(PACKED if turn % 2 else OTHER)
                    layer.refit(**(other if turn == 4 else cuda(other)))


class Refusals(unittest.TestCase):
    def test_places_types_and_shapes_are_named(self):
        there = cuda(PACKED.arguments)
        for words, call in [
            ("gate is on cuda:0, expected cpu, where the layer is", lambda: fourmoe.pack(**there)),
            (r"down\[1\] is on cuda:0, expected cpu, where the layer is",
             lambda: fourmoe.pack(**{**PACKED.arguments, "down": [PACKED.arguments["down"][:9], there["down"][9:]]})),
            ("up_bias is i32, expected f32, f16, bf16", lambda: pack(there | {"up_bias": torch.zeros(16, 80).int().cuda()})),
            (r"up_bias is \[experts, 8\], expected \[experts, 80\]", lambda: pack(there | {"up_bias": torch.zeros(16, 8).cuda()})),
            ("up_scale is i32, expected", lambda: pack(there | {"up_scale": there["up_scale"].view(torch.uint8).int()})),
            ("up_global is for 15 experts, up for 16", lambda: pack(there | {"up_global": there["up_global"][1:]})),
            ("up has elements of a row 2 apart", lambda: pack(there | {"up": there["up"].repeat(1, 1, 2)[:, :, ::2]})),
            ("up has rows 0 bytes apart, expected at least 64",
             lambda: pack(there | {"up": there["up"][:, :1].expand(-1, 80, -1)})),
            (r"router is \[16, 64\], expected \[16, 128\]", lambda: pack(there | {"router": torch.zeros(16, 64).cuda()})),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()

    def test_values_are_refused_and_a_refit_leaves_the_layer(self):
        layer = pack(PACKED.arguments)
        call = tokens(9)
        before = layer(*call)
        for words, name, change in [
            (r"up_scale, expert 9, has 0xff at \[3, 2\]: NaN or negative", "up_scale", lambda t: t[9, 3, 2:3].fill_(0xFF)),
            (r"down_scale, expert 0, has 0x80 at \[127, 4\]", "down_scale", lambda t: t[0, 127, 4:].fill_(0x80)),
            ("gate_global, expert 3, is nan, expected finite", "gate_global", lambda t: t.view(torch.float32)[3:4].fill_(torch.nan)),
        ]:
            there = cuda(weights_of(OTHER))
            change(there[name].view(torch.uint8))
            for ask in (lambda: pack(there | {"top_k": 4}), lambda: layer.refit(**there)):  # noqa: B023
                with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                    ask()
            self.assertTrue(torch.equal(layer(*call), before))
            self.assertTrue(torch.equal(layer(*call, precision="w4a4"), pack(PACKED.arguments, precision="w4a4")(*call)))

    def test_captures_are_refused(self):
        layer = pack(PACKED.arguments)
        call = tokens(8)
        before = layer(*call)
        there = cuda(weights_of(OTHER))
        for weights in (there, weights_of(OTHER)):
            graph = torch.cuda.CUDAGraph()
            with self.assertRaisesRegex(fourmoe.ArgumentError, "stream is being captured into a graph"):
                with torch.cuda.graph(graph):
                    layer.refit(**weights)
            torch.cuda.synchronize()
            self.assertTrue(torch.equal(layer(*call), before))

    def test_another_gpu(self):
        if torch.cuda.device_count() < 2:
            self.skipTest("one GPU here")
        elsewhere = torch.from_numpy(PACKED.arguments["up"]).to("cuda:1")
        with self.assertRaisesRegex(fourmoe.ArgumentError, "up is on cuda:1, expected cpu or cuda:0, where the layer is"):
            pack(PACKED.arguments | {"up": elsewhere})
        there = {name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value
                 for name, value in cuda(PACKED.arguments).items()}
        call = tokens(9)
        second = fourmoe.pack(**there, device="cuda:1")(*(tensor.to("cuda:1") for tensor in call))
        self.assertTrue(torch.equal(second.cpu(), pack(PACKED.arguments)(*call).cpu()))


if __name__ == "__main__":
    unittest.main()
