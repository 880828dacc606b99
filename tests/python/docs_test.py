#!/usr/bin/env python3
"""Runs the blocks of docs/python.md, and sees that each public function has an example there."""
import contextlib
import io
import os
import re
import unittest

from package import SOURCE, fourmoe

PAGE = (SOURCE / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


class Tutorial(unittest.TestCase):
    def test_blocks_run(self):
        names, missing = {}, set()
        os.chdir(SOURCE)
        for number, block in enumerate(BLOCKS):
            if any(re.search(rf"\b{name}\b", block) for name in missing):
                continue
            with self.subTest(block=number), contextlib.redirect_stdout(io.StringIO()):
                try:
                    exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
                except ModuleNotFoundError as error:
                    self.assertIn(error.name, ("torch", "transformers"))
                    missing.add(error.name)
        print(f"{len(BLOCKS)} blocks, without those for {sorted(missing) or 'nothing'}")

    def test_every_public_function_has_an_example(self):
        for name in fourmoe.__all__:
            if name.startswith("__") or name in ("Error", "Layer", "UnavailableError"):
                continue
            self.assertTrue(any(re.search(rf"\b{name}\b", block) for block in BLOCKS), name)
        for name in ("explain", "workspace_bytes", "refit", "wait"):
            self.assertTrue(any(f".{name}(" in block for block in BLOCKS), name)


if __name__ == "__main__":
    unittest.main()
