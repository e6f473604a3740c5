"""Effects of a run on its process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

from dpa4 import DPA4Calculator, load_potential, relax, run_md
from dpa4.data import read_frames
from dpa4.potential.checkpoint import save_potential
from dpa4.system import choose_device, user_path
from dpa4.training.options import RunConfig
from helpers import molecule, small_potential

STEPS = """
import json, resource, sys, torch
from dpa4.system import keep_freed_memory
if sys.argv[1] == "keeps":
    keep_freed_memory(torch.device("cpu"))

def faults():
    tensors = [torch.ones(2_000_000) for _ in range(8)]  # 8 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(json.dumps([faults() for _ in range(6)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="for the allocator of glibc")
def test_pages_of_freed_tensors_are_used_again():
    faults = {}
    for name in ("gives back", "keeps"):
        done = subprocess.run([sys.executable, "-c", STEPS, name], capture_output=True, text=True, check=True)
        counts = json.loads(done.stdout)
        faults[name] = counts[-1] - counts[1]
    pages = 4 * 8 * 8_000_000 / 4096
    if faults["gives back"] < 0.2 * pages:
        pytest.skip("this system hands out memory in large pages, or the allocator keeps it anyway")
    assert faults["keeps"] < 0.1 * pages  # the heap grows now and then


@pytest.mark.parametrize("name", ["gpu", "mps", "meta"])
def test_devices_other_than_cpu_and_cuda_are_refused(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu or cuda, got '{name}'"):
        choose_device(name)


def test_the_home_folder_in_paths_of_functions(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    save_potential(small_potential(), "~/m.safetensors")
    write(home / "a.xyz", molecule())
    load_potential("~/m.safetensors")
    DPA4Calculator("~/m.safetensors", device="cpu")
    assert len(read_frames("~/a.xyz")) == 1
    relax(bulk("Cu"), EMT(), trajectory="~/path.xyz")
    run_md(bulk("Cu"), EMT(), "~/md", steps=1, progress=False)
    config = RunConfig.model_validate(
        {"data": {"train": ["~/a.xyz"], "validation": "~/b.xyz"}, "output": "~/run"}
    )
    assert (config.data.train, config.data.validation) == ((home / "a.xyz",), (home / "b.xyz",))
    assert config.output == home / "run"
    assert {p.name for p in home.iterdir()} == {"m.safetensors", "a.xyz", "path.xyz", "md"}
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_other_tildes_are_part_of_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("a~", "a/~/b", "~no_such_user_at_all/b", "./~", "x~1.xyz"):
        assert str(user_path(name)) == str(Path(name))
    assert str(user_path("~")) == "/home/me"
