#!/usr/bin/env python3
"""mypy --strict accepts a user's program and the package, and notices wrong use."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from package import SOURCE, TINY, require

require("mypy")
HERE = pathlib.Path(__file__).parent
PACKAGE = next(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)


def mypy(*arguments):
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", cache, *arguments]
        return subprocess.run(command, env={**os.environ, "MYPYPATH": PACKAGE}, cwd=SOURCE, capture_output=True, text=True)


class Typing(unittest.TestCase):
    def test_a_users_program(self):
        result = mypy(str(HERE / "typed_program.py"))
        self.assertEqual((result.returncode, result.stdout), (0, ""))

    def test_the_program_runs(self):
        subprocess.run([sys.executable, str(HERE / "typed_program.py"), str(TINY / "nvfp4")], check=True, capture_output=True)

    def test_wrong_use_is_noticed(self):
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, "wrong.py")
            program.write_text("import fourmoe\nlayer = fourmoe.load('x', layre=1)\nlayer.hidden = 3\n"
                               "text: int = layer.explain()\nfourmoe.pack(up=1)\n")
            lines = mypy(str(program)).stdout
        for line, words in ((2, "layre"), (3, "read-only"), (4, "Incompatible types"), (5, "Missing named argument")):
            self.assertRegex(lines, rf"wrong.py:{line}: error: .*{words}")

    def test_the_package_itself(self):
        result = mypy(*(str(SOURCE / "python" / "fourmoe" / name) for name in ("__init__.py", "_api.py", "__main__.py")))
        self.assertEqual((result.returncode, result.stdout), (0, ""))


if __name__ == "__main__":
    unittest.main()
