"""Worker processes know every operator that compiled code may contain; the test needs no compiler."""

import json
import subprocess
import sys

import torch

import dpa4.execution.regions  # noqa: F401  (this process can trace potentials)
from dpa4.tracing import region


def test_a_worker_knows_every_operator():
    """Stages contain operators that are registered in the process that traces them."""
    registered = torch._C._dispatch_get_all_op_names()
    names = sorted(n.removeprefix("dpa4::").split(".")[0] for n in registered if n.startswith("dpa4::"))
    assert {"edge_matmul", "segment_sum", "so2_value", "bilinear", "so2_joint"} <= set(names)
    code = (
        "import json, sys, dpa4.tracing.workers, torch; "
        "print(json.dumps([n for n in json.loads(sys.argv[1]) if not hasattr(torch.ops.dpa4, n)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=True
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
