#!/usr/bin/env python3
"""Weights that say that they lie on a GPU: what is refused by name, and that the host reads none of it."""
import ctypes
import unittest

from package import Packed, fourmoe, np

NOWHERE = 4096  # an address that nobody may read
CUDA = 2  # DLPack's kDLCUDA

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class OnGpu:
    """The shape and type of a numpy array, at an address of a GPU: reading it on the host ends the process."""

    def __init__(self, array, device=0):
        self.array, self.device = array, device

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__()
        tensor = pointer_of(capsule, b"dltensor")  # data, device type and device index come first
        ctypes.c_void_p.from_address(tensor).value = NOWHERE
        ctypes.c_int32.from_address(tensor + 8).value = CUDA
        ctypes.c_int32.from_address(tensor + 12).value = self.device
        return capsule

    def __dlpack_device__(self):
        return CUDA, self.device


def weights_of(packed):
    return {name: value for name, value in packed.arguments.items() if name != "top_k"}


class Places(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.packed = Packed(experts=5)
        cls.packed.arguments |= {
            "up_bias": np.zeros((5, 48), np.float32), "input_scale": np.full(1, 0.002, np.float32),
            "inter_scale": np.full(5, 0.002, np.float32)}
        cls.extra = {"router": np.zeros((5, 64), np.float32), "router_bias": np.zeros(5, np.float32),
                     "selection_bias": np.zeros(5, np.float32)}

    def refused(self, words, call, reason="memory_misplaced"):
        with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words) as caught:
            call()
        self.assertEqual(caught.exception.reason, reason)

    def test_a_layer_of_the_host_refuses_each_argument_by_name(self):
        given = self.packed.arguments | self.extra
        for name, value in given.items():
            if name != "top_k":
                self.refused(f"^{name} is on cuda:0, expected cpu, where the layer is$",
                             lambda: fourmoe.pack(**{**given, name: OnGpu(value)}))  # noqa: B023

    def test_the_split_is_named(self):
        up = self.packed.arguments["up"]
        given = {**self.packed.arguments, "up": [up[:2], OnGpu(up[2:].copy(), 1)]}
        self.refused(r"^up\[1\] is on cuda:1, expected cpu, where", lambda: fourmoe.pack(**given))

    def test_a_layer_of_another_gpu_refuses(self):
        given = {**self.packed.arguments, "down_scale": OnGpu(self.packed.arguments["down_scale"], 5)}
        self.refused("^down_scale is on cuda:5, expected cpu or cuda:1, where the layer is$",
                     lambda: fourmoe.pack(**given, device="cuda:1"))

    def test_refit_refuses_and_the_layer_keeps_its_weights(self):
        layer = fourmoe.pack(**self.packed.arguments)
        x, ids, weights = self.packed.tokens(7)
        before = layer(x, ids, weights)
        other = weights_of(Packed(experts=5, seed=4))
        self.refused("^gate is on cuda:0, expected cpu", lambda: layer.refit(**{**other, "gate": OnGpu(other["gate"])}))
        np.testing.assert_array_equal(layer(x, ids, weights), before)

    def test_shapes_and_types_are_refused_before_anything_is_read(self):
        given = {name: OnGpu(value) if isinstance(value, np.ndarray) else value
                 for name, value in self.packed.arguments.items()}
        for words, reason, change in [
            (r"up\[1\] is \[2, 48, 16\], expected \[experts, 48, 32\] as in up\[0\]", "argument_invalid",
             {"up": [given["up"], OnGpu(np.zeros((2, 48, 16), np.uint8))]}),
            ("up has elements of a row 2 apart", "stride_unsupported",
             {"up": OnGpu(np.zeros((5, 48, 64), np.uint8)[:, :, ::2])}),
            (r"down_scale\[1\] is f32, expected u8 as in down_scale\[0\]", "dtype_unsupported",
             {"down_scale": [given["down_scale"], OnGpu(np.zeros((5, 64, 3), np.float32))]}),
        ]:
            self.refused(words, lambda: fourmoe.pack(**{**given, **change}, device="cuda:0"), reason)  # noqa: B023

    def test_without_a_gpu_the_layer_is_unavailable(self):
        try:
            fourmoe.pack(**self.packed.arguments, device="cuda:0")
            self.skipTest("a GPU here would read the address")
        except fourmoe.UnavailableError:
            pass
        for name in ("up", "up_global"):
            with self.assertRaises(fourmoe.UnavailableError):
                fourmoe.pack(**{**self.packed.arguments, name: OnGpu(self.packed.arguments[name])}, device="cuda:0")


class Kept(unittest.TestCase):
    def test_the_router_is_a_copy_that_a_refit_leaves(self):
        packed = Packed(experts=5)
        x = packed.tokens(7)[0]
        router = packed.random.standard_normal((5, 64)).astype(np.float32)
        expected = fourmoe.pack(**packed.arguments, router=router.copy())(x)
        layer = fourmoe.pack(**packed.arguments, router=router)
        router[:] = np.nan
        layer.refit(**weights_of(packed))
        np.testing.assert_array_equal(layer(x), expected)

    def test_a_refused_refit_is_not_kept(self):
        packed, other = Packed(experts=5), weights_of(Packed(experts=6, seed=4))
        x, ids, weights = packed.tokens(7)
        layer = fourmoe.pack(**packed.arguments, plan="reference")
        before = layer(x, ids, weights)
        with self.assertRaises(fourmoe.ArgumentError):
            layer.refit(**other)
        np.testing.assert_array_equal(layer(x, ids, weights), before)
        np.testing.assert_allclose(layer(x, ids, weights, plan="cpu"), before, rtol=2e-2, atol=1e-3)


if __name__ == "__main__":
    unittest.main()
