"""`python -m fourmoe ARGUMENTS` is `fourmoe explain ARGUMENTS`; `fourmoe` is the whole command."""
import os
import pathlib
import sys

COMMAND = pathlib.Path(__file__).with_name("bin") / "fourmoe"


def command() -> None:
    os.execv(COMMAND, [str(COMMAND), *sys.argv[1:]])


if __name__ == "__main__":
    os.execv(COMMAND, [str(COMMAND), "explain", *sys.argv[1:]])
