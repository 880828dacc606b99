#!/usr/bin/env python3
"""Lists of weight tensors: any splits along the expert dimension give the bits of the stacked tensor, or a refusal."""
import unittest

from package import Packed, fourmoe, np

NAMES = [f"{projection}{part}" for projection in ("gate", "up", "down") for part in ("", "_scale", "_global")]


def cut(array, sizes):
    """Copies, each in memory of its own."""
    return [piece.copy() for piece in np.split(array, np.cumsum(sizes)[:-1])]


class Splits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.packed = Packed(experts=7)
        cls.tokens = cls.packed.tokens(11)
        cls.arguments = {**cls.packed.arguments, "input_scale": np.linspace(0.002, 0.004, 7, dtype=np.float32),
                         "up_bias": cls.packed.random.standard_normal((7, 48)).astype(np.float32)}

    def outputs(self, arguments):
        return [fourmoe.pack(**arguments, plan=plan, precision=precision)(*self.tokens)
                for plan in ("cpu", "reference") for precision in ("w4a16", "w4a4")]

    def test_any_sizes_are_bitwise_the_stack(self):
        expected = self.outputs(self.arguments)
        for sizes in ([7], [1] * 7, [3, 4], [1, 5, 1], [6, 1]):
            split = {name: cut(value, sizes) if name != "top_k" else value for name, value in self.arguments.items()}
            for found, stacked in zip(self.outputs(split), expected):
                np.testing.assert_array_equal(found, stacked)

    def test_each_tensor_may_be_split_in_its_own_way(self):
        expected = self.outputs(self.arguments)
        split = dict(self.arguments)
        for index, name in enumerate(NAMES):
            split[name] = tuple(cut(self.arguments[name], [1 + index % 5, 6 - index % 5]))
        for found, stacked in zip(self.outputs(split), expected):
            np.testing.assert_array_equal(found, stacked)

    def test_order_of_splits_matters(self):
        split = {**self.arguments, "down": cut(self.arguments["down"], [3, 4])[::-1]}
        self.assertFalse(np.array_equal(self.outputs(split)[0], self.outputs(self.arguments)[0]))

    def test_refit_takes_lists(self):
        layer = fourmoe.pack(**Packed(experts=7, seed=9).arguments)
        split = {name: cut(value, [2, 5]) for name, value in self.packed.arguments.items() if name != "top_k"}
        layer.refit(**split)
        np.testing.assert_array_equal(layer(*self.tokens), fourmoe.pack(**self.packed.arguments)(*self.tokens))

    def test_refusals_name_the_split(self):
        a = self.arguments
        up, scale, global_ = (cut(a[name], [3, 2, 2]) for name in ("up", "up_scale", "up_global"))
        for words, change in [
            ("up is an empty list, expected at least one tensor", {"up": []}),
            (r"up\[1\] is \[0, 48, 32\], expected at least one expert", {"up": [up[0], up[1][:0], up[2]]}),
            (r"up\[2\] is \[2, 32, 32\], expected \[experts, 48, 32\] as in up\[0\]",
             {"up": [*up[:2], up[2][:, :32].copy()]}),
            (r"up\[1\] is f32, expected u8 as in up\[0\]", {"up": [up[0], up[1].astype(np.float32), up[2]]}),
            (r"up_scale\[2\] is \[2, 48\], expected \[experts, 48, 4\] as in", {"up_scale": [*scale[:2], scale[2][..., 0].copy()]}),
            ("up_scale is for 5 experts, up for 7", {"up_scale": scale[:2]}),
            ("up_global is for 5 experts, up for 7", {"up_global": global_[:2]}),
            (r"up_global\[1\] is another type, expected f32 as", {"up_global": [global_[0], global_[1].astype("d"), global_[2]]}),
            ("gate is for 7 experts, up for 5", {"up": up[:2]}),
            (r"down\[1\] is int, expected an array|down is int", {"down": [a["down"][:3], 5]}),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                fourmoe.pack(**{**a, **change})

    def test_values_are_refused_with_split_and_expert(self):
        bad = cut(self.arguments["gate_scale"], [3, 4])
        bad[1][1, 7, 2] = 0x80
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"gate_scale\[1\], expert 4, has 0x80 at \[7, 2\]: NaN or"):
            fourmoe.pack(**{**self.arguments, "gate_scale": bad})
        bad = cut(self.arguments["down_global"], [3, 4])
        bad[0][2] = 0
        with self.assertRaisesRegex(fourmoe.ArgumentError, r"down_global\[0\], expert 2, is 0, expected finite and above"):
            fourmoe.pack(**{**self.arguments, "down_global": bad})

    def test_wrong_kinds_of_weights(self):
        a = self.arguments
        for words, change in [
            ("gate is missing; only relu2 has none", {"gate": None}),
            ("gate is given, but relu2 has none", {"activation": "relu2"}),
            ("up_scale is missing", {"up_scale": None}),
            ("up_scale is given, but up is f32; only u8 codes have", {"up": self.packed.dense["up"].astype("f")}),
            (r"down is \[64, 32\], expected \[64, 48\] to go with up", {"down": a["down"][:, :, :16], "down_scale": a["down_scale"][:, :, :2]}),
            (r"up_scale is \[experts, 48, 3\], expected \[experts, 48, 4\] to go with up",
             {"up_scale": np.ascontiguousarray(a["up_scale"][:, :, :3])}),
            ("up has 2 dimensions, expected 3", {"up": a["up"][:, :, 0].copy()}),
            (r"activation is 'silu', expected one of 'swiglu', ", {"activation": "silu"}),
            ("top-k is 9, expected 1 to 7", {"top_k": 9}),
            ("up has elements of a row 2 apart", {"up": np.zeros((7, 48, 64), np.uint8)[:, :, ::2]}),
        ]:
            with self.subTest(words), self.assertRaisesRegex(fourmoe.ArgumentError, words):
                fourmoe.pack(**{**a, **change})


if __name__ == "__main__":
    unittest.main()
