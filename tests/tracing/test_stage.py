"""Stages as text: the graph read back equals the one written, at every size."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dpa4.tracing.stage import Recipe, Stage, graph_of, recipe_of, symbolic_sizes
from dpa4.tracing.trace import Trace, TracedStage

SIZES = {"node": 1001, "edge": 5003}


def function(x, v):
    """Constants without tensor arguments, several results of one operator, a size times a number, infinity."""
    first, second = x.split(2, -1)
    sign = torch.where(v > 0, 1.0, -1.0)
    ones = v.new_ones(v.shape[0], 3)
    limited = torch.cat([first * second, x[:, :2]]).clamp(-torch.inf, 0.5)
    return [limited, (ones * sign[:, None]).view(-1), x.new_zeros(x.shape[0] + 1).to(torch.float32)]


def recipe() -> Recipe:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = symbolic_sizes(mode, SIZES)
    with mode:
        x = torch.empty(sizes["node"], 4, dtype=torch.float64)
        v = torch.empty(sizes["edge"], dtype=torch.float64)
    with enable_python_dispatcher():
        graph = make_fx(function)(x, v).graph
    graph.set_codegen(fx.graph.CodeGen())  # like that of a graph built node by node
    return recipe_of(graph, {size.node.expr: axis for axis, size in sizes.items()}, SIZES)


def test_text_is_the_graph():
    written = Recipe.read(json.loads(json.dumps(recipe())))
    assert written == recipe()
    assert [r.shape for r in written.results] == [["2*node", 2], ["3*edge"], ["node + 1"]]
    module = fx.GraphModule({}, graph_of(written))
    for n, e in ((2, 3), (7, 2)):
        x, v = torch.randn(n, 4, dtype=torch.float64), torch.randn(e, dtype=torch.float64)
        for found, expected in zip(module(x, v), function(x, v), strict=True):
            assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_outline_has_the_shapes_of_the_results():
    outline = Stage(recipe(), [(0, 0), (0, 1)]).outline()
    x, v = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for found, expected in zip(outline(x, v), function(x, v), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype


def test_text_that_does_not_explain_itself_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    y = graph.call_function(json.dumps, (x,))
    y.meta["val"] = torch.empty(2)
    graph.output([y])
    with pytest.raises(NotImplementedError, match="json"):
        recipe_of(graph, {}, {})


def test_operators_of_python_are_known():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.mul, (x, 3.0))
    for node in (x, y):
        node.meta["val"] = torch.empty(2)
    graph.output([y])
    module = fx.GraphModule({}, graph_of(recipe_of(graph, {}, {})))
    assert torch.equal(module(torch.ones(2))[0], torch.full((2,), 3.0))


def test_text_that_someone_else_wrote_is_not_executed(tmp_path):
    """A trace is a program: it is read only if this user stored it."""
    file = tmp_path / "trace.json"
    planted = "raise SystemExit('the text of another user ran')\ndef forward(self):\n    return []\n"
    written = Trace([TracedStage(Recipe(planted, [], [], {}), [])] * 3, [[True], [True]], None, {})
    file.write_text(json.dumps(written))
    assert Trace.read(file) is None
    written.write(file)
    assert Trace.read(file) == written
    file.chmod(0o666)
    assert Trace.read(file) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_compiler_reads_nothing_from_the_temporary_folder(tmp_path):
    """Headers included, which PyTorch by default compiles into a folder of predictable name there."""
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from test_stage import Stage, recipe, torch
stage = Stage(recipe(), [(0, 0), (0, 1)])
print(stage.compile()(torch.ones(7, 4, dtype=torch.float64), torch.ones(5, dtype=torch.float64))[0].shape)
"""
    folders = {name: tmp_path / name for name in ("temporary", "caches")}
    for folder in folders.values():
        folder.mkdir(mode=0o700)
    environment = os.environ | {"TMPDIR": str(folders["temporary"]), "XDG_CACHE_HOME": str(folders["caches"])}
    del environment["TORCHINDUCTOR_CACHE_DIR"]
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "torch.Size([14, 2])\n"
    assert list((folders["caches"] / "dpa4" / "inductor").rglob("*.so"))
    assert not list(folders["temporary"].rglob("torchinductor_*"))
