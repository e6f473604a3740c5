"""Worker processes know every operator that compiled code may contain; the test needs no compiler."""

import json
import re
import subprocess
import sys

from dpa4.execution import precompile
from dpa4.execution.precompile import Mode
from dpa4.execution.regions import compile_potential
from dpa4.tracing import region
from helpers import random_potential


class Listed:
    """Stub for the worker pool that lists the stages that workers would compile."""

    def __init__(self):
        self.stages: list = []

    def start(self) -> None:
        pass

    def add(self, stages: list) -> None:
        self.stages += stages


def operators_of(**options) -> set[str]:
    """Names of the operators of this package in the stages of a potential, for training and for inference."""
    potential, pool = random_potential(n_blocks=1, **options), Listed()
    compile_potential(potential)
    for mode in (Mode(training=True), Mode(training=False)):
        precompile._outline(potential, mode, pool)
    return {
        name for stage in pool.stages for name in re.findall(r"torch\.ops\.dpa4\.(\w+)", stage.recipe.source)
    }


def test_a_worker_knows_every_operator_of_the_stages(empty_cache):
    # C++ kernels exist for 16 channels, not for 8; SO(3) grids multiply fields.
    named = operators_of(channels=16, message_node_so3=True, ffn_on="so3", ffn_grid=1) | operators_of()
    assert {"edge_matmul", "segment_sum", "so2_value"} <= named
    code = (
        "import json, sys, dpa4.tracing.workers, torch; "
        "print(json.dumps([n for n in json.loads(sys.argv[1]) if not hasattr(torch.ops.dpa4, n)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sorted(named))], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == []


def test_the_key_of_the_cache_covers_sub_folders(tmp_path):
    for name in ("ops/a.py", "ops/triton/deep/b.py", "tracing/c.py", "model/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = region._traced_sources(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "model/d.py", "ops/a.py", "ops/triton/deep/b.py", "tracing/c.py"
    ]  # fmt: skip


def test_the_key_of_the_cache_covers_the_tracer_and_the_network():
    names = {path.name for path in region._traced_sources(region.Path(region.__file__).parents[1])}
    assert {"region.py", "trace.py", "network.py", "so2.py"} <= names
