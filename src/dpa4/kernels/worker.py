"""What a process does that compiles stages for another one (`dpa4.potential.precompile`)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor

from dpa4.kernels import bilinear, matmul, pairs, rotate, segments, so2  # noqa: F401  # their operators are in the stages
from dpa4.kernels.stage import Recipe, make_file


def run(start: dict[str, Any]) -> None:
    """Compile the stages that are read from standard input, one per line, and answer each with a line.

    Args:
        start: Numbers of threads: ``threads`` of the code, and ``compile_threads`` of the compiler.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(start["threads"])
    inductor.compile_threads = start["compile_threads"]
    for line in sys.stdin:
        recipe, file = json.loads(line)
        make_file(Recipe.read(recipe), Path(file))
        print("made", file=answers, flush=True)
