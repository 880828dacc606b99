#!/usr/bin/env python3
"""The reference room against layers computed by numpy alone, in float64, from other libraries' dequantised weights."""
import sys
import unittest

import numpy as np

from library import F32, SOURCE, W4A16, Library

sys.path.insert(0, str(SOURCE / "examples" / "tiny-moe"))
from model import read_safetensors, relative_l2  # noqa: E402

FIXTURES = SOURCE / "tests" / "fixtures"
BOUNDS = {b"reference": 1e-6, b"cpu": 2e-4}


class Reference(unittest.TestCase):
    def check_layer(self, checkpoint, layer, name):
        expected, _ = read_safetensors(FIXTURES / "reference" / f"{name}.safetensors")
        hidden, ids = np.array(expected["hidden_states"]), np.array(expected["topk_ids"])
        weights = np.array(expected["topk_weights"])
        for backend, bound in BOUNDS.items():
            library = Library(FIXTURES / checkpoint, W4A16, backend)
            output = library.run(layer, hidden, F32, ids, weights)
            shared = library.run(layer, hidden, F32, np.full_like(ids, -1), weights)  # what stays without any pick
            self.assertLess(relative_l2(output - shared, expected["output"]), bound, backend)
            # The rounding of the intermediate is there: without it the figure is a hundred times larger.
            self.assertGreater(relative_l2(output - shared, expected["output_exact"]), 1e-4, backend)

    def test_swiglu(self):
        self.check_layer("modelopt-qwen3", 0, "qwen3")

    def test_clamped_swiglu_with_biases(self):
        self.check_layer("gpt-oss-mxfp4", 0, "gpt-oss")

    def test_relu_squared(self):
        self.check_layer("modelopt-nemotron", 1, "nemotron")


if __name__ == "__main__":
    unittest.main()
