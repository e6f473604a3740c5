"""Effects of a run on its process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

from dpa4 import DPA4Calculator, load_potential, relax, run_md, system
from dpa4.data import read_frames
from dpa4.potential.checkpoint import save_potential
from dpa4.system import choose_device, own_settings, user_path
from dpa4.training.options import RunConfig
from helpers import molecule, small_potential

ROOT = Path(__file__).resolve().parents[1]
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
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or.*cuda:1; got '{name}'"):
        choose_device(name)


def test_the_command_for_an_extra_fits_the_installation(tmp_path, monkeypatch):
    """pip finds extras in the metadata of an installed wheel; a checkout may not be installed at all."""
    assert system.install_command("d3") == f"pip install --editable '{ROOT}[d3]'"
    installed = tmp_path / "lib" / "site-packages" / "dpa4" / "system.py"
    monkeypatch.setattr(system, "__file__", str(installed))
    assert system.install_command("d3") == "pip install 'dpa4[d3]'"
    with pytest.raises(ImportError, match=r"no_such_package is not installed; pip install 'dpa4\[d3\]'"):
        system.require("no_such_package", "d3")


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="device = cuda:2, but there are 2 GPUs: cuda:0 to cuda:1"):
        choose_device("cuda:2")
    data = {"data": {"train": "a.xyz"}}
    assert RunConfig.model_validate(data | {"device": "cuda:1"}).device == "cuda:1"
    for name in ("cuda:x", "gpu", "cuda:1\n"):
        with pytest.raises(ValueError, match="device"):
            RunConfig.model_validate(data | {"device": name})


def test_the_gpu_of_an_object_is_current_while_its_methods_run(monkeypatch):
    """Triton launches kernels on the current GPU, wherever the tensors are."""
    current = [0]

    class Current:
        def __init__(self, device):
            self.index, self.before = device.index, current[0]

        def __enter__(self):
            current[0] = self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(system, "_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])

    class Model:
        def __init__(self, device):
            self.device = torch.device(device)

        @own_settings
        def run(self):
            return current[0]

    assert [Model(device).run() for device in ("cuda:1", "cuda:0", "cpu", "cuda")] == [1, 0, 0, 0]
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_the_second_gpu_gives_the_results_of_the_first():
    potential = small_potential()
    found = []
    for device in ("cuda:0", "cuda:1"):
        atoms = molecule()
        atoms.calc = DPA4Calculator(potential, device=device)
        found.append(atoms.get_forces())
    assert torch.cuda.current_device() == 0
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_home_folder_in_paths_of_functions(tmp_path, tmp_path_factory, monkeypatch):
    matplotlib_folder = tmp_path_factory.mktemp("matplotlib")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv(
        "MPLCONFIGDIR", str(matplotlib_folder)
    )  # matplotlib makes ~/.config when it is first imported
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
