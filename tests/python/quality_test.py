#!/usr/bin/env python3
"""What a user cares about: bits per byte of the shipped model on held-out text, its experts computed by the library.

The model's forward pass is examples/tiny-moe/model.py (numpy); its experts are replaced by calls of the C ABI. Expected
figures are those that ModelOpt's own dequantised experts gave in torch (metadata of capture.safetensors).
"""
import importlib.util
import sys
import unittest

from library import BF16, SOURCE, W4A4, W4A8_INT8, W4A16, Library, from_bf16, to_bf16

TINY = SOURCE / "examples" / "tiny-moe"


def load_model():
    spec = importlib.util.spec_from_file_location("model", TINY / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load_model()
capture, metadata = model.read_safetensors(TINY / "capture.safetensors")


class Blocks(unittest.TestCase):
    """Each layer on captured activations, routed by the layer's own router, against ModelOpt's outputs."""

    def check_blocks(self, precision, suffix, bound):
        library = Library(TINY / "nvfp4", precision)
        for layer in range(4):
            hidden = to_bf16(capture[f"layer{layer}.hidden_states"])
            output = from_bf16(library.run(layer, hidden, BF16))
            expected = capture[f"layer{layer}.output{suffix}"]
            self.assertLess(model.relative_l2(output, expected), bound, f"layer {layer}")

    def test_w4a16(self):  # two roundings to bf16, 1.7e-3 each, and the library's intermediate is rounded too
        self.check_blocks(W4A16, "_w4a16", 3e-3)

    def test_w4a4(self):
        self.check_blocks(W4A4, "_w4a4", 1e-2)

    def test_wrong_precision_is_noticed(self):
        with self.assertRaises(AssertionError):
            self.check_blocks(W4A4, "_w4a16", 1e-2)


class BitsPerByte(unittest.TestCase):
    """docs/design.md section 1: right. Printed, so that the README's table can be checked."""

    def measure(self, folder, precision, name, tolerance):
        library = Library(TINY / folder, precision)
        bits = model.Model(TINY / "bf16", library.experts).bits_per_byte(capture["tokens"])
        expected = float(metadata[f"bits_per_byte.{name}"])
        print(f"bits per byte, {folder} experts, {name}: {bits:.5f} (torch {expected:.5f})", file=sys.stderr)
        self.assertAlmostEqual(bits, expected, delta=tolerance)
        return bits

    # torch computed in f32; the library rounds tokens and intermediate to bf16.
    def test_bf16_experts(self):
        self.measure("bf16", W4A16, "bf16", 5e-4)

    def test_w4a16(self):
        self.measure("nvfp4", W4A16, "w4a16", 5e-4)

    # Lossy: torch's figure is of activations that are not quantised.
    def test_w4a8_int8(self):
        self.measure("nvfp4", W4A8_INT8, "w4a16", 3e-3)

    # A value on a rounding boundary falls on either side and later layers route by it: see examples/tiny-moe/README.md.
    def test_w4a4(self):
        self.measure("nvfp4", W4A4, "w4a4", 3e-3)


if __name__ == "__main__":
    unittest.main()
