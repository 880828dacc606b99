#!/usr/bin/env python3
"""The Python package with numpy alone: results, contracts and refusals of load, pack, call, refit, and inspection."""
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
import weakref

from package import SOURCE, TINY, Packed, experts, fourmoe, np, relative_l2

BOUND = 5e-4  # sums in f32, and an intermediate value in a thousand that rounds the other way
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


class Import(unittest.TestCase):
    def test_is_quick_and_brings_no_framework(self):
        seconds, brought = run_python(
            "import sys, time; start = time.perf_counter(); import fourmoe; print(time.perf_counter() - start);"
            "print([m for m in ('torch', 'numpy', 'transformers', 'jax') if m in sys.modules])").splitlines()
        self.assertLess(float(seconds), 1.0)
        self.assertEqual(brought, "[]")

    def test_names_have_documentation(self):
        for name in fourmoe.__all__:
            thing = getattr(fourmoe, name)
            self.assertTrue(isinstance(thing, str) or thing.__doc__, name)
        for name in ("__call__", "explain", "workspace_bytes", "refit"):
            self.assertTrue(getattr(fourmoe.Layer, name).__doc__, name)


class Results(unittest.TestCase):
    def test_packed_layer_against_numpy(self):
        packed = Packed()
        layer = fourmoe.pack(**packed.arguments)
        x, ids, weights = packed.tokens(37)
        found = layer(x, ids, weights)
        self.assertEqual((found.dtype, found.shape), (np.float32, (37, 64)))
        self.assertLess(relative_l2(found, packed.expected(x, ids, weights)), BOUND)

    def test_swapped_gate_and_up_is_noticed(self):
        packed = Packed()
        swapped = {**packed.arguments}
        for part in ("", "_scale", "_global"):
            swapped[f"gate{part}"], swapped[f"up{part}"] = swapped[f"up{part}"], swapped[f"gate{part}"]
        x, ids, weights = packed.tokens(8)
        self.assertGreater(relative_l2(fourmoe.pack(**swapped)(x, ids, weights), packed.expected(x, ids, weights)), 0.1)

    def test_global_scales_are_kept_apart(self):
        packed = Packed()
        shared = {**packed.arguments, "up_global": packed.arguments["gate_global"]}
        x, ids, weights = packed.tokens(8)
        self.assertGreater(relative_l2(fourmoe.pack(**shared)(x, ids, weights), packed.expected(x, ids, weights)), 0.02)

    def test_dense_weights_of_each_type(self):
        packed = Packed()
        x, ids, weights = packed.tokens(9)
        for dtype in (np.float32, np.float16):
            dense = {name: values.astype(dtype) for name, values in packed.dense.items()}
            expected = experts(x, ids, weights, *(dense[name].astype(np.float64) for name in ("gate", "up", "down")))
            self.assertLess(relative_l2(fourmoe.pack(**dense, top_k=2)(x, ids, weights), expected), BOUND)

    def test_local_experts_skip_the_others(self):
        packed = Packed()
        x, ids, weights = packed.tokens(12)
        parts = {name: value[2:5] for name, value in packed.arguments.items() if name != "top_k"}
        layer = fourmoe.pack(**parts, top_k=2, experts=8, first_expert=2)
        outside = (ids < 2) | (ids >= 5)
        expected = packed.expected(x, np.where(outside, -1, ids), weights)
        self.assertLess(relative_l2(layer(x, ids, weights), expected), BOUND)

    def test_own_router_logits_and_picks_agree(self):
        packed = Packed()
        router = packed.random.standard_normal((8, 64)).astype(np.float32)
        layer = fourmoe.pack(**packed.arguments, router=router)
        x, _, _ = packed.tokens(6)
        logits = (x.astype(np.float64) @ router.T).astype(np.float32)
        ids, weights = fourmoe.route(logits, top_k=2)
        np.testing.assert_array_equal(layer(x, ids, weights), layer(x, router_logits=logits))
        self.assertLess(relative_l2(layer(x), layer(x, ids, weights)), 1e-6)

    def test_precision_and_plan_of_a_call(self):
        packed = Packed()
        layer = fourmoe.pack(**packed.arguments)
        x, ids, weights = packed.tokens(5)
        w4a4 = fourmoe.pack(**packed.arguments, precision="w4a4", plan="reference")(x, ids, weights)
        np.testing.assert_array_equal(layer(x, ids, weights, precision="w4a4", plan="reference"), w4a4)
        self.assertGreater(relative_l2(w4a4, layer(x, ids, weights)), 0.02)
        int8 = layer(x, ids, weights, precision="w4a8_int8")
        self.assertLess(relative_l2(int8, layer(x, ids, weights, precision="w4a8_int8", plan="reference")), 3e-3)
        self.assertTrue(0.003 < relative_l2(int8, layer(x, ids, weights)) < 0.02)
        np.testing.assert_array_equal(fourmoe.pack(**packed.arguments, precision="w4a8_int8")(x, ids, weights), int8)
        with self.assertRaisesRegex(ValueError, "no backend is called 'gpu9'; there are auto, .*cpu, reference"):
            layer(x, ids, weights, plan="gpu9")

    def test_tokens_that_are_quantised_already(self):
        packed = Packed()
        scale = np.float32(0.002)
        layer = fourmoe.pack(**packed.arguments, precision="w4a4", input_scale=np.array([scale]))
        x, ids, weights = packed.tokens(40)  # more than one pass of the small layer below
        codes, scales, _ = fourmoe.quantize(x, global_scale=float(scale))
        small = fourmoe.pack(**packed.arguments, precision="w4a4", input_scale=np.array([scale]), max_tokens=16)
        for plan in ("cpu", "reference"):
            expected = layer(x, ids, weights, plan=plan)
            for other in (layer, small):
                found = other(codes, ids, weights, hidden_scales=scales, plan=plan, out=np.empty_like(expected))
                np.testing.assert_array_equal(found, expected)
        # Codes that the quantiser would not have chosen are kept: 4 and less in every block.
        odd = codes & 0x66
        values = fourmoe.decode(odd, scales, float(scale))
        out = layer(odd, ids, weights, hidden_scales=scales, out=np.empty_like(expected))
        self.assertGreater(relative_l2(out, layer(values, ids, weights)), 1e-3)
        reference = layer(odd, ids, weights, hidden_scales=scales, plan="reference", out=np.empty_like(expected))
        self.assertLess(relative_l2(out, reference), 1e-2)
        bad = scales.copy()
        bad[5, 2] = 0xFF
        for words, call in [
            (r"hidden_scales\[5, 2\] is 0xff", lambda: layer(codes, ids, weights, hidden_scales=bad, out=out)),
            (r"hidden_scales is \[40, 3\], expected \[40, 4\]",
             lambda: layer(codes, ids, weights, hidden_scales=np.ascontiguousarray(scales[:, :3]), out=out)),
            ("w4a4 without routing weights on the input would pass", lambda: layer(codes, ids, weights, hidden_scales=scales, out=out, precision="w4a16")),
            ("hidden_states is f32, expected u8", lambda: layer(x, ids, weights, hidden_scales=scales, out=out)),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()

    def test_bf16_of_ml_dtypes(self):
        try:
            import ml_dtypes
        except ImportError:
            self.skipTest("no ml_dtypes here")
        packed = Packed()
        layer = fourmoe.pack(**packed.arguments)
        x, ids, weights = packed.tokens(5)
        found = layer(x.astype(ml_dtypes.bfloat16), ids, weights)
        self.assertEqual(found.dtype, ml_dtypes.bfloat16)
        expected = layer(x.astype(ml_dtypes.bfloat16).astype(np.float32), ids, weights)
        np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))
        scales = packed.arguments["up_scale"].view(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(fourmoe.pack(**{**packed.arguments, "up_scale": scales})(x, ids, weights),
                                      layer(x, ids, weights))

    def test_arrays_of_jax(self):
        try:
            import jax
        except ImportError:
            self.skipTest("no jax here")
        packed = Packed()
        arrays = packed.tokens(5)
        with jax.default_device(jax.devices("cpu")[0]):
            layer = fourmoe.pack(**{name: jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value
                                    for name, value in packed.arguments.items()})
            found = layer(*map(jax.numpy.asarray, arrays))
            self.assertIsInstance(found, jax.Array)
            np.testing.assert_array_equal(np.asarray(found), fourmoe.pack(**packed.arguments)(*arrays))
            half = layer(jax.numpy.asarray(arrays[0], jax.numpy.bfloat16), *map(jax.numpy.asarray, arrays[1:]))
            self.assertEqual(half.dtype, jax.numpy.bfloat16)

    def test_functions_return_arrays_of_jax(self):
        try:
            import jax
        except ImportError:
            self.skipTest("no jax here")
        with jax.default_device(jax.devices("cpu")[0]):
            fused = jax.numpy.arange(24, dtype="float32").reshape(2, 4, 3)
            gate, up = fourmoe.split_gate_up(fused)
            self.assertIsInstance(gate, jax.Array)
            self.assertIsInstance(up, jax.Array)
            np.testing.assert_array_equal(np.asarray(gate), np.asarray(fused)[:, :2])
            self.assertIsInstance(fourmoe.linear_scales(jax.numpy.zeros((32, 4, 1, 4, 1, 2), "uint8")), jax.Array)

    def test_arrays_of_jax_are_not_written(self):
        try:
            import jax
        except ImportError:
            self.skipTest("no jax here")
        packed = Packed()
        layer = fourmoe.pack(**packed.arguments)
        arrays = packed.tokens(5)
        with jax.default_device(jax.devices("cpu")[0]):
            out = jax.numpy.zeros((5, 64))
            with self.assertRaisesRegex(fourmoe.ArgumentError, "out is read-only"):
                layer(*arrays, out=out)
            with self.assertRaisesRegex(fourmoe.ArgumentError, "workspace is read-only"):
                layer(*arrays, workspace=jax.numpy.zeros(layer.workspace_bytes(), "uint8"))
            np.testing.assert_array_equal(np.asarray(out), 0)

    def test_memory_of_plain_python(self):
        packed = Packed()
        x, ids, weights = packed.tokens(5)
        out = memoryview(bytearray(4 * 5 * 64)).cast("f", (5, 64))
        layer = fourmoe.pack(**packed.arguments)
        layer(memoryview(x), memoryview(ids), memoryview(weights), out=out)
        np.testing.assert_array_equal(np.asarray(out), layer(x, ids, weights))


class Contracts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.packed = Packed()
        cls.layer = fourmoe.pack(**cls.packed.arguments, max_tokens=16)

    def test_no_tokens(self):
        x, ids, weights = self.packed.tokens(0)
        self.assertEqual(self.layer(x, ids, weights).shape, (0, 64))

    def test_out_is_overwritten_and_rows_beyond_are_not_touched(self):
        x, ids, weights = self.packed.tokens(21)  # more than one pass
        out = np.full((23, 64), 7, np.float32)
        self.assertIs(self.layer(x, ids, weights, out=out), out)
        np.testing.assert_array_equal(out[:21], self.layer(x, ids, weights))
        np.testing.assert_array_equal(out[21:], 7)

    def test_strided_rows(self):
        x, ids, weights = self.packed.tokens(6)
        wide = np.full((6, 80), np.nan, np.float32)
        wide[:, 8:72] = x
        np.testing.assert_array_equal(self.layer(wide[:, 8:72], ids, weights), self.layer(x, ids, weights))

    def test_skipped_picks_and_long_ids(self):
        x, ids, weights = self.packed.tokens(6)
        ids[:, 1] = -1
        expected = self.packed.expected(x, ids, weights)
        found = self.layer(x, ids.astype(np.int64), weights)
        self.assertLess(relative_l2(found, expected), BOUND)

    def test_read_only_inputs_are_fine_and_a_read_only_out_is_not(self):
        x, ids, weights = self.packed.tokens(3)
        expected = self.layer(x, ids, weights)
        out = np.empty_like(expected)
        for array in (x, ids, weights, out):
            array.flags.writeable = False
        np.testing.assert_array_equal(self.layer(x, ids, weights), expected)
        with self.assertRaisesRegex(ValueError, "out is read-only"):
            self.layer(x, ids, weights, out=out)

    def test_workspace_of_the_caller_at_any_alignment(self):
        x, ids, weights = self.packed.tokens(5)
        expected = self.layer(x, ids, weights)
        need = self.layer.workspace_bytes(5)
        for skip in (0, 1, 63):
            memory = np.full(need + skip, 0xFF, np.uint8)
            np.testing.assert_array_equal(self.layer(x, ids, weights, workspace=memory[skip:]), expected)
        with self.assertRaisesRegex(ValueError, f"workspace has 100 bytes, expected {need}"):
            self.layer(x, ids, weights, workspace=np.empty(100, np.uint8))

    def test_what_is_written_shares_no_memory(self):
        x, ids, weights = self.packed.tokens(5)
        need, size = self.layer.workspace_bytes(), x.nbytes
        memory = np.zeros(-(-need // 64) * 64 + size, np.uint8)
        inside = memory[size : 2 * size].view(np.float32).reshape(5, 64)
        inside[:] = x
        with self.assertRaisesRegex(fourmoe.ArgumentError, "workspace shares memory with out"):
            self.layer(x, ids, weights, out=inside, workspace=memory)
        with self.assertRaisesRegex(fourmoe.ArgumentError, "workspace shares memory with hidden_states"):
            self.layer(inside, ids, weights, workspace=memory)
        np.testing.assert_array_equal(inside, x)
        after = memory[-size:].view(np.float32).reshape(5, 64)  # what the call does not use
        np.testing.assert_array_equal(self.layer(x, ids, weights, out=after, workspace=memory),
                                      self.layer(x, ids, weights))
        quantised = fourmoe.pack(**self.packed.arguments, precision="w4a4")
        codes, scales, _ = fourmoe.quantize(x)
        out = np.zeros((5, 64), np.float32)
        held = out.view(np.uint8).reshape(-1)[: scales.size].reshape(scales.shape)
        with self.assertRaisesRegex(fourmoe.ArgumentError, "out shares memory with hidden_scales"):
            quantised(codes, ids, weights, hidden_scales=held, out=out)

    def test_rows_of_out_that_overlap_are_refused(self):
        x, ids, weights = self.packed.tokens(5)
        one_by_one = fourmoe.pack(**self.packed.arguments, max_tokens=1)
        out = np.lib.stride_tricks.as_strided(np.zeros(128, np.float32), (5, 64), (4, 4))
        for layer in (self.layer, one_by_one):
            with self.assertRaisesRegex(fourmoe.ArgumentError, "out has rows 1 elements apart, expected at least 64"):
                layer(x, ids, weights, out=out)

    def test_an_out_between_two_elements_is_named(self):
        x, ids, weights = self.packed.tokens(5)
        out = np.zeros(x.nbytes + 4, np.uint8)[1:-3].view(np.float32).reshape(5, 64)
        with self.assertRaisesRegex(fourmoe.ArgumentError, "^out begins "):
            self.layer(x, ids, weights, out=out)

    def test_memory_that_only_dlpack_keeps(self):
        packed = Packed(hidden=512, inter=256)
        layer = fourmoe.pack(**packed.arguments)
        x, ids, weights = packed.tokens(300)

        class Copying:
            def __init__(self, array):
                self.array = array

            def __dlpack__(self, **options):
                return self.array.copy().__dlpack__()

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        np.testing.assert_array_equal(layer(Copying(x), Copying(ids), Copying(weights)), layer(x, ids, weights))

    def test_wrong_arguments_are_named(self):
        x, ids, weights = self.packed.tokens(4)
        wide = np.zeros((4, 128), np.float32)
        for words, call in [
            ("hidden_states is None", lambda: self.layer(None, ids, weights)),
            ("hidden_states is str, expected an array", lambda: self.layer("x", ids, weights)),
            (r"hidden_states is \[4, 48\], expected \[4, 64\]", lambda: self.layer(x[:, :48], ids, weights)),
            (r"hidden_states is \[2, 2, 64\], expected 2 dim", lambda: self.layer(x.reshape(2, 2, 64), ids, weights)),
            ("hidden_states is another type, expected f32, f16, bf16", lambda: self.layer(x.astype("d"), ids, weights)),
            ("hidden_states has elements of a row 2 apart", lambda: self.layer(wide[:, ::2], ids, weights)),
            (r"topk_ids is \[3, 2\], expected \[4, 2\]", lambda: self.layer(x, ids[:3], weights)),
            ("topk_ids is f32, expected i32, i64", lambda: self.layer(x, weights, weights)),
            ("topk_ids and topk_weights go together", lambda: self.layer(x, ids)),
            (r"topk_ids\[0, 0\] is 8, expected -1 to 7", lambda: self.layer(x, ids * 0 + 8, weights)),
            ("both given", lambda: self.layer(x, ids, weights, router_logits=np.zeros((4, 8), np.float32))),
            (r"router_logits is \[4, 7\], expected \[4, 8\]", lambda: self.layer(x, router_logits=wide[:, :7])),
            ("give router_logits, or topk_ids", lambda: self.layer(x)),
            (r"out is \[3, 64\], expected \[4, 64\]", lambda: self.layer(x, ids, weights, out=np.empty((3, 64), "f"))),
            ("out shares memory with hidden_states", lambda: self.layer(x, ids, weights, out=x)),
            ("precision is 'w8', expected 'w4a16', 'w4a4' or 'w4a8_int8'", lambda: self.layer(x, ids, weights, precision="w8")),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()

    def test_errors_are_python_errors_with_a_reason(self):
        with self.assertRaises(ValueError) as caught:
            fourmoe.load("no/such/place", layer=0)
        self.assertEqual(caught.exception.reason, "file_unreadable")
        with self.assertRaises(RuntimeError) as caught:
            fourmoe.pack(**self.packed.arguments, device="cuda:77")
        self.assertIsInstance(caught.exception, fourmoe.UnavailableError)
        with self.assertRaisesRegex(ValueError, "device is 'tpu', expected 'cpu', 'cuda' or 'cuda:N'"):
            fourmoe.pack(**self.packed.arguments, device="tpu")

    def test_many_threads_at_once(self):
        x, ids, weights = self.packed.tokens(16)
        expected = [self.layer(x[:n], ids[:n], weights[:n]) for n in range(1, 17)]
        failures = []

        def work(seed):
            memory = np.empty(self.layer.workspace_bytes(), np.uint8) if seed % 2 else None
            for turn in range(40):
                n = (seed * 7 + turn) % 16 + 1
                found = self.layer(x[:n], ids[:n], weights[:n], workspace=memory)
                if not np.array_equal(found, expected[n - 1]):
                    failures.append((seed, turn))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])


    def test_a_packed_layer_needs_its_file_no_more(self):
        with tempfile.TemporaryDirectory() as scratch:
            copy = pathlib.Path(scratch) / "copy"
            shutil.copytree(TINY / "nvfp4", copy)
            layer = fourmoe.load(copy, layer=0)
            x = np.random.default_rng(3).standard_normal((5, layer.hidden)).astype(np.float32)
            before = layer(x)  # by its own router
            os.truncate(copy / "model.safetensors", 100)
            np.testing.assert_array_equal(layer(x), before)

    def test_numbers_that_are_not_finite(self):
        x, _, _ = self.packed.tokens(4)
        nan = np.zeros(8, np.float32)
        nan[3] = np.nan
        logits = np.zeros((4, 8), np.float32)
        router = np.zeros((8, 64), np.float16)
        router[2, 5] = np.inf
        for words, call in [
            (r"router has inf at \[2, 5\]", lambda: fourmoe.pack(**self.packed.arguments, router=router)),
            (r"router_bias has nan at \[3\]", lambda: fourmoe.pack(**self.packed.arguments, router=np.ones((8, 64), np.float32), router_bias=nan)),
            ("alpha is nan, expected a finite number", lambda: fourmoe.pack(**self.packed.arguments, alpha=np.nan)),
            ("beta is inf, expected a finite number", lambda: fourmoe.pack(**self.packed.arguments, beta=np.inf)),
            ("scale is nan, expected a finite number", lambda: fourmoe.pack(**self.packed.arguments, scale=np.nan)),
            ("scale is nan, expected a finite number", lambda: fourmoe.route(logits, top_k=2, scale=np.nan)),
            (r"selection_bias\[3\] is nan, expected a finite number", lambda: fourmoe.pack(**self.packed.arguments, selection_bias=nan)),
            (r"selection_bias\[3\] is nan, expected a finite number", lambda: fourmoe.route(logits, top_k=2, selection_bias=nan)),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                call()

    def test_a_daemon_thread_at_work_when_the_interpreter_ends(self):
        run_python(
            "import threading, time\n"
            "from package import Packed, fourmoe\n"
            "packed = Packed(hidden=256, inter=256)\n"
            "layer, arrays = fourmoe.pack(**packed.arguments), packed.tokens(32)\n"
            "def work():\n"
            "    while True: layer(*arrays)\n"
            "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
            "time.sleep(0.1)\n")


class Memory(unittest.TestCase):
    def test_layer_keeps_the_weights_alive_and_frees_them(self):
        class Watched(np.ndarray):
            pass

        packed = Packed()
        x, ids, weights = packed.tokens(4)
        expected = packed.expected(x, ids, weights)
        codes = packed.arguments["up"].copy().view(Watched)
        watch = weakref.ref(codes)
        layer = fourmoe.pack(**{**packed.arguments, "up": codes}, plan="reference")
        del codes, packed
        gc.collect()
        self.assertIsNotNone(watch())
        self.assertLess(relative_l2(layer(x, ids, weights), expected), BOUND)
        del layer
        gc.collect()
        self.assertIsNone(watch())

    def test_a_freed_layer_is_refused_by_its_handle(self):
        layer = fourmoe.pack(**Packed().arguments)
        handle = layer.handle
        self.assertIs(fourmoe._core.find_layer(handle), layer)
        del layer
        gc.collect()
        with self.assertRaisesRegex(fourmoe.ArgumentError, f"no layer has the handle {handle}: it was freed"):
            fourmoe._core.find_layer(handle)


class Refit(unittest.TestCase):
    def test_new_weights_in_place(self):
        old, new = Packed(seed=1), Packed(seed=2)
        x, ids, weights = new.tokens(7)
        for plan in ("cpu", "reference"):
            layer = fourmoe.pack(**old.arguments, plan=plan)
            before, size = layer(x, ids, weights), layer.packed_bytes
            layer(x, ids, weights, precision="w4a4")  # a second plan of the same weights
            replaced = {name: value for name, value in new.arguments.items() if name != "top_k"}
            layer.refit(**replaced)
            fresh = fourmoe.pack(**new.arguments, plan=plan)
            np.testing.assert_array_equal(layer(x, ids, weights), fresh(x, ids, weights))
            np.testing.assert_array_equal(layer(x, ids, weights, precision="w4a4"),
                                          fresh(x, ids, weights, precision="w4a4"))
            self.assertFalse(np.array_equal(before, layer(x, ids, weights)))
            self.assertEqual(layer.packed_bytes, size)

    def test_a_refusal_leaves_the_old_weights(self):
        old, other = Packed(seed=1), Packed(inter=64)
        layer = fourmoe.pack(**old.arguments)
        x, ids, weights = old.tokens(7)
        before = layer(x, ids, weights)
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"8 experts of \[64, 64\] nvfp4, swiglu, expected 8 experts of \[48, 64\] nvfp4, swiglu"):
            layer.refit(**{name: value for name, value in other.arguments.items() if name != "top_k"})
        bad = {name: value for name, value in old.arguments.items() if name != "top_k"}
        bad["down_scale"] = bad["down_scale"].copy()
        bad["down_scale"][3, 5, 1] = 0x7F
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"down_scale, expert 3, has 0x7f at \[5, 1\]"):
            layer.refit(**bad)
        np.testing.assert_array_equal(layer(x, ids, weights), before)

    def test_a_loaded_layer_keeps_its_router(self):
        new = Packed(experts=32, hidden=128, inter=64, top_k=4)
        layer = fourmoe.load(TINY / "nvfp4", layer=1)
        for _ in range(2):
            layer.refit(**{name: value for name, value in new.arguments.items() if name != "top_k"})
            gc.collect()
        raw = (TINY / "nvfp4" / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        router = json.loads(raw[8:begin])["model.layers.1.mlp.gate.weight"]
        self.assertEqual((router["dtype"], router["shape"]), ("BF16", [32, 128]))
        halves = np.frombuffer(raw, np.uint16, 32 * 128, begin + router["data_offsets"][0])
        values = (halves.astype(np.uint32) << 16).view(np.float32).reshape(32, 128)
        x = new.tokens(7)[0]
        np.testing.assert_array_equal(layer(x), fourmoe.pack(**new.arguments, router=values)(x))

    def test_while_other_threads_call(self):
        first, second = Packed(seed=1), Packed(seed=2)
        x, ids, weights = first.tokens(5)
        allowed = [fourmoe.pack(**p.arguments)(x, ids, weights) for p in (first, second)]
        layer = fourmoe.pack(**first.arguments)
        failures, done = [], threading.Event()

        def call():
            while not done.is_set():
                found = layer(x, ids, weights)
                if not any(np.array_equal(found, value) for value in allowed):
                    failures.append(found)

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(60):
            source = (second, first)[turn % 2]
            layer.refit(**{name: value for name, value in source.arguments.items() if name != "top_k"})
        done.set()
        for thread in threads:
            thread.join()
        self.assertEqual(len(failures), 0)


class Checkpoints(unittest.TestCase):
    def test_load(self):
        self.assertEqual(fourmoe.layers(TINY / "nvfp4"), [0, 1, 2, 3])
        layer = fourmoe.load(TINY / "nvfp4", layer=1)
        self.assertEqual((layer.hidden, layer.inter, layer.experts, layer.top_k), (128, 64, 32, 4))
        self.assertEqual((layer.encoding, layer.precision, layer.device), ("nvfp4", "w4a16", "cpu"))
        self.assertTrue(layer.has_router)
        with self.assertRaisesRegex(ValueError, "layer is not given; .* has MoE layers 0, 1, 2, 3"):
            fourmoe.load(TINY / "nvfp4")

    def test_arguments_that_are_refused(self):
        with self.assertRaisesRegex(fourmoe.ArgumentError, "layer is -1, expected at least 0"):
            fourmoe.load(TINY / "nvfp4", layer=-1)
        with self.assertRaisesRegex(fourmoe.ArgumentError, "does not exist"):
            fourmoe.load(os.fsdecode(b"no/such/\xff"), layer=0)

    def test_tuning_is_a_path(self):
        path = TINY / "nvfp4"
        for tuning in (None, "", "no/such/file", pathlib.Path("no/such/file")):
            self.assertGreater(fourmoe.load(path, layer=0, tuning=tuning).hidden, 0)
        with self.assertRaisesRegex(fourmoe.ArgumentError, "tuning is 7, expected a path"):
            fourmoe.load(path, layer=0, tuning=7)

    def test_explain_is_what_the_command_prints(self):
        path = str(TINY / "nvfp4")
        arguments = [path, "--layer", "1", "--tokens", "16"]
        command = subprocess.run([os.environ.get("FOURMOE_COMMAND", SOURCE / "build" / "fourmoe"), "explain", *arguments],
                                 capture_output=True, text=True, check=True).stdout
        self.assertEqual(fourmoe.load(path, layer=1).explain(16), command)
        module = subprocess.run([sys.executable, "-m", "fourmoe", *arguments], env=ENVIRONMENT, capture_output=True,
                                text=True, check=True).stdout
        self.assertEqual(module, command)


class Inspection(unittest.TestCase):
    def test_quantize_and_decode(self):
        values = np.random.default_rng(3).standard_normal((2, 5, 64)).astype(np.float32)
        codes, scales, globals_ = fourmoe.quantize(values)
        self.assertEqual((codes.shape, scales.shape, globals_.shape), ((2, 5, 32), (2, 5, 4), (2,)))
        np.testing.assert_allclose(globals_, np.abs(values).max((1, 2)) / 2688, rtol=1e-6)
        again = fourmoe.decode(codes, scales, globals_)
        self.assertLess(relative_l2(again, values), 0.12)
        np.testing.assert_array_equal(fourmoe.decode(codes, scales, globals_), 
                                      fourmoe.decode(codes, scales) * globals_[:, None, None])
        one = fourmoe.quantize(values[0], global_scale=0.5)
        np.testing.assert_array_equal(one[2], np.float32(0.5))

    def test_decode_of_all_codes(self):
        codes = np.arange(256, dtype=np.uint8).reshape(1, 256)[:, :256]
        table = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)
        expected = np.stack([table[codes[0] & 15], table[codes[0] >> 4]], 1).reshape(1, 512)
        np.testing.assert_array_equal(fourmoe.decode(codes, np.full((1, 32), 0x38, np.uint8)), expected)
        np.testing.assert_array_equal(fourmoe.decode(codes, np.full((1, 16), 128, np.uint8)), 2 * expected)  # MXFP4

    def test_route(self):
        logits = np.random.default_rng(4).standard_normal((6, 8)).astype(np.float32)
        ids, weights = fourmoe.route(logits, top_k=3)
        np.testing.assert_array_equal(ids, np.argsort(-logits, 1, kind="stable")[:, :3])
        scores = np.exp(np.take_along_axis(logits, ids.astype(int), 1).astype(np.float64))
        np.testing.assert_allclose(weights, scores / scores.sum(1, keepdims=True), rtol=1e-6)
        bias = np.zeros(8, np.float32)
        bias[5] = 100
        ids, weights = fourmoe.route(logits, top_k=1, score="sigmoid", selection_bias=bias, renormalise=False, scale=2.0)
        np.testing.assert_array_equal(ids, 5)
        np.testing.assert_allclose(weights[:, 0], 2 / (1 + np.exp(-logits[:, 5].astype(np.float64))), rtol=1e-6)

    def test_gate_and_up_of_each_row_order(self):
        gate = np.random.default_rng(5).integers(0, 255, (3, 128, 7)).astype(np.uint8)
        up = gate + 1
        for group, up_first in ((1, False), (16, False), (64, True), (128, True)):
            pieces = [half.reshape(3, 128 // group, 1, group, 7) for half in ((up, gate) if up_first else (gate, up))]
            fused = np.ascontiguousarray(np.concatenate(pieces, 2).reshape(3, 256, 7))
            found = fourmoe.split_gate_up(fused, group, up_first)
            np.testing.assert_array_equal(found[0], gate)
            np.testing.assert_array_equal(found[1], up)
        for group in (96, 256, -1, 2**63 - 1):
            with self.assertRaisesRegex(ValueError, f"group is {group}, expected a divisor of 128"):
                fourmoe.split_gate_up(np.zeros((1, 256, 2), np.uint8), group)
        with self.assertRaisesRegex(ValueError, "tensor has 5 rows, expected a positive even number"):
            fourmoe.split_gate_up(np.zeros((1, 5, 2), np.uint8))

    def test_gate_and_up_of_each_type(self):
        def split(values):
            return fourmoe.split_gate_up(values)[0]

        for dtype in (np.float32, np.float16, np.int32, np.int64, np.uint8):
            values = np.arange(24).reshape(2, 4, 3).astype(dtype)
            np.testing.assert_array_equal(split(values), values[:, :2])
            self.assertEqual(split(values).dtype, dtype)
        for dtype in (np.float64, np.int16, np.int8, bool, np.complex64):
            with self.assertRaisesRegex(fourmoe.ArgumentError, "tensor is another type, expected f32, "):
                split(np.zeros((2, 4, 3), dtype))
        try:
            import ml_dtypes
        except ImportError:
            self.skipTest("no ml_dtypes here")
        for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu):
            values = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
            np.testing.assert_array_equal(split(values.view(dtype)), values[:, :2])

    def test_nothing_and_what_is_not_finite(self):
        codes, scales, globals_ = fourmoe.quantize(np.zeros((2, 0, 64), np.float32))
        self.assertEqual((codes.shape, scales.shape, globals_.shape), ((2, 0, 32), (2, 0, 4), (2,)))
        self.assertEqual(fourmoe.split_gate_up(np.zeros((0, 4, 3), np.float32))[0].shape, (0, 2, 3))
        values = np.zeros((2, 3, 5, 64), np.float32)
        values[1, 2, 3, 7] = np.nan
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"values\[1, 2\]' has nan at \[3, 7\]"):
            fourmoe.quantize(values)

    def test_arguments_of_route(self):
        with self.assertRaisesRegex(fourmoe.ArgumentError, "router_logits is None"):
            fourmoe.route(None, top_k=2)
        many = np.broadcast_to(np.zeros((1, 1), np.float32), ((1 << 24) + 1, 1))
        with self.assertRaisesRegex(fourmoe.ArgumentError, "router_logits has 16777217 rows, expected at most 16777216"):
            fourmoe.route(many, top_k=1)

    def test_scales_out_of_atoms(self):
        rows, blocks, experts = 256, 8, 3
        linear = np.random.default_rng(6).integers(0, 127, (experts, rows, blocks)).astype(np.uint8)
        memory = np.zeros(experts * rows * blocks, np.uint8)
        for e, r, b in np.ndindex(experts, rows, blocks):
            at = ((r // 128) * (blocks // 4) + b // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + b % 4
            memory[e * rows * blocks + at] = linear[e, r, b]
        atoms = memory.reshape(experts, rows // 128, blocks // 4, 32, 4, 4).transpose(3, 4, 1, 5, 2, 0)
        np.testing.assert_array_equal(fourmoe.linear_scales(atoms), linear)


if __name__ == "__main__":
    unittest.main()
