"""Training in several processes: the numbers of one process, resuming, and processes that fail, die or hang."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from dpa4.data.division import balanced, least
from dpa4.output import read_csv
from dpa4.training import dry_run, train_committee, watch
from dpa4.training.launcher import launched
from dpa4.training.options import RunConfig
from dpa4.training.processes import Processes
from dpa4.training.run import train
from dpa4.training.state import load_state
from dpa4.training.trainer import Trainer
from training_processes import free_port, in_double_precision, together, train_together
from training_runs import MODEL, SILENT, argon, assert_same_run, kill_at, options

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Structures with different labels and weights, one without an edge; 17 of them are trained on."""
    images = argon(20)
    far = Atoms("Ar2", positions=[[0, 0, 0], [9, 0, 0]])
    far.calc = SinglePointCalculator(far, energy=0.01, forces=np.full((2, 3), 0.02))
    images[0].calc = SinglePointCalculator(
        images[0], energy=images[0].get_potential_energy()
    )  # without forces
    images[3].info["config_weight"] = 3.0
    file = tmp_path_factory.mktemp("data") / "data.xyz"
    ase.io.write(file, [*images, far])
    return file


def run_options(data: Path, output: Path, bridging="auto", **training) -> dict:
    """Options of a run of 8 steps, of which the sixth has two structures and the others three."""
    defaults = {"steps": 8, "log_interval": 1, "validation_interval": 4, "optimizer": "adamw"}
    values = options(data, output, **(defaults | training))
    return values | {"model": MODEL | {"bridging": bridging}}


def assert_close_runs(one: Path, two: Path, tolerance: float) -> None:
    """Compare all columns of the logs but the time, and the final weights, relative to the largest."""
    for name in ("train.csv", "valid.csv"):
        a, b = read_csv(one / name), read_csv(two / name)
        assert len(a) == len(b) > 0
        for row, other in zip(a, b, strict=True):
            for key in row.keys() - {"seconds"}:
                found, expected = (float(r[key] or "nan") for r in (other, row))
                close = pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
                assert found == close, (name, row["step"], key)
    a, b = (load_state(folder / "last.pt") for folder in (one, two))
    for key, value in a["potential"].items():
        assert (b["potential"][key] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), (
            key
        )
    assert (a["step"], a["epoch"], a["batch"]) == (b["step"], b["epoch"], b["batch"])


# --- the same numbers


# With bridging there are fragments in every batch. Without, a process may have no edge, hence no gradients.
# Sums in another order differ by 1e-15. In the second case some gradients are zero but for rounding, 1e-17 in one run
# and 0 in the other. Adam divides by their size plus 1e-8, so these weights differ by up to 4e-10 after a step.
@pytest.mark.parametrize(
    ("bridging", "size", "batch_size", "tolerance"),
    [("auto", 2, 3, 1e-12), pytest.param(None, 3, 2, 1e-8, marks=pytest.mark.slow)],
)
def test_several_processes_give_the_numbers_of_one(
    data, tmp_path, monkeypatch, bridging, size, batch_size, tolerance
):
    """Losses, errors, gradient norms, validation and weights, in float64, also with idle processes."""
    in_double_precision(monkeypatch)
    one = run_options(data, tmp_path / "one", bridging, batch_size=batch_size)
    train(RunConfig.model_validate(one), console=SILENT)
    several = one | {"output": str(tmp_path / "several")}
    ended = train_together(several, tmp_path, size)
    assert ended.statuses == [0] * size, ended.texts
    assert f"{size} processes" in ended.texts[0]
    assert not any(ended.texts[1:])  # only process 0 prints
    assert {p.name for p in (tmp_path / "several").iterdir()} == {
        p.name for p in (tmp_path / "one").iterdir()
    }
    first, same = (read_csv(tmp_path / name / "train.csv")[0] for name in ("one", "several"))
    for key in (
        "energy",
        "forces",
        "virial",
        "loss",
        "gradient_norm",
        "energy_mae",
        "forces_mae",
        "virial_mae",
    ):
        assert float(same[key] or 0) == pytest.approx(float(first[key] or 0), rel=1e-12), key
    assert_close_runs(tmp_path / "one", tmp_path / "several", tolerance)


@pytest.mark.slow
def test_muon_in_two_processes(data, tmp_path, monkeypatch):
    """The first gradients agree to 1e-12. Muon rounds to 8 bits, so later steps differ more."""
    in_double_precision(monkeypatch)
    one = run_options(data, tmp_path / "one", steps=3, optimizer="hybrid_muon")
    train(RunConfig.model_validate(one), console=SILENT)
    ended = train_together(one | {"output": str(tmp_path / "two")}, tmp_path)
    assert ended.statuses == [0, 0], ended.texts
    a, b = (read_csv(tmp_path / name / "train.csv") for name in ("one", "two"))
    for key in ("loss", "gradient_norm", "forces_mae"):
        assert float(b[0][key]) == pytest.approx(float(a[0][key]), rel=1e-12)
    # One flipped rounding to bfloat16 (0.4 %) in a step of 2e-3 changes a weight by 1e-5.
    assert_close_runs(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.slow
def test_fine_tuning_in_two_processes(data, tmp_path, monkeypatch):
    """The start, its new reference energies and the errors of step 0 are those of one process."""
    in_double_precision(monkeypatch)
    train(RunConfig.model_validate(run_options(data, tmp_path / "start")), console=SILENT)
    start = {"model": {"start_from": str(tmp_path / "start" / "best.safetensors")}}
    one = run_options(data, tmp_path / "one") | start
    train(RunConfig.model_validate(one), console=SILENT)
    ended = train_together(one | {"output": str(tmp_path / "two")}, tmp_path)
    assert ended.statuses == [0, 0], ended.texts
    assert read_csv(tmp_path / "two" / "valid.csv")[0]["step"] == "0"
    assert_close_runs(tmp_path / "one", tmp_path / "two", 1e-12)


# --- resuming


@pytest.mark.slow
def test_resume_on_the_same_and_on_another_number(data, tmp_path, monkeypatch):
    in_double_precision(monkeypatch)
    values = run_options(data, tmp_path / "whole", steps=5, checkpoint_interval=2)
    assert train_together(values, tmp_path).statuses == [0, 0]
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        assert all(train_together(values | {"output": str(tmp_path / "same")}, tmp_path).statuses)
    shutil.copytree(tmp_path / "same", tmp_path / "alone")
    assert load_state(tmp_path / "same" / "last.pt")["step"] == 4
    ended = train_together(values | {"output": str(tmp_path / "same")}, tmp_path, resume=True)
    assert ended.statuses == [0, 0], ended.texts
    assert_same_run(tmp_path / "whole", tmp_path / "same")  # bit for bit
    config = RunConfig.model_validate(values | {"output": str(tmp_path / "alone")})
    train(config, resume=True, console=SILENT)
    assert_close_runs(tmp_path / "whole", tmp_path / "alone", 1e-12)


# --- signals and failures


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(data, tmp_path, monkeypatch, number):
    after(monkeypatch, 3, rank=1, action=lambda: os.kill(os.getpid(), number))
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path)
    assert ended.statuses == [128 + number] * 2, ended.texts
    assert "stopped after step 5; continue with --resume" in ended.texts[0]
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 5  # agreed on before the next step


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_the_run_with_its_reason(data, tmp_path, monkeypatch, rank):
    def fail():
        raise RuntimeError("no more memory on the device")

    after(monkeypatch, 3, rank, fail)
    start = time.monotonic()
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path)
    assert time.monotonic() - start < 60
    assert all(ended.statuses)
    assert "no more memory on the device" in ended.texts[0]
    assert rank == 0 or "process 1 of 2" in ended.texts[0]
    assert "memory" not in ended.texts[1]


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_stops_ends_the_run_with_its_reason(data, tmp_path, monkeypatch, rank, number):
    monkeypatch.setattr(watch, "SILENCE", 3.0)  # instead of 25 s
    monkeypatch.setattr(watch, "SUSPICION", 2.0)
    monkeypatch.setattr(watch, "BEAT", 0.2)
    after(monkeypatch, 3, rank, lambda: os.kill(os.getpid(), number))
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path, seconds=20)
    assert ended.statuses[1 - rank] == 1, ended.texts
    assert ended.statuses[rank] == -signal.SIGKILL
    assert f"process {rank} of 2 on " in ended.texts[1 - rank]
    assert "has given no sign of life for " in ended.texts[1 - rank]
    assert "continue it with --resume" in ended.texts[1 - rank]
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 0  # as before


@pytest.mark.slow
def test_a_process_that_waits_for_ever_ends_the_run(data, tmp_path, monkeypatch):
    """Its watch still gives signs of life, but it does nothing."""
    monkeypatch.setattr(watch, "STUCK", 3.0)  # instead of 45 s
    monkeypatch.setattr(watch, "BEAT", 0.2)
    monkeypatch.setattr("dpa4.training.processes.STEPS", 0)  # steps of a busy machine are slow
    after(monkeypatch, 3, 1, lambda: time.sleep(600))
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path, seconds=30)
    assert ended.statuses[0] == 1, ended.texts
    assert "process 1 of 2 on " in ended.texts[0]
    assert "has done nothing for " in ended.texts[0]


@pytest.mark.slow
def test_a_structure_that_one_process_cannot_use_is_refused_by_all(data, tmp_path, monkeypatch):
    """The state before it is saved, as in one process."""

    def refuse():
        raise ValueError("data.xyz frame 7: two atoms at one place")

    after(monkeypatch, 3, 1, refuse, method="_check_for_test")
    original = Trainer._batches

    def batches(self):
        check = self.potential.check
        self.potential.check = lambda graph: (self._check_for_test(), check(graph))
        return original(self)

    monkeypatch.setattr(Trainer, "_batches", batches)
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path)
    assert all(ended.statuses)
    assert "ValueError: data.xyz frame 7: two atoms at one place. The state before it" in ended.texts[0]
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 3


def after(monkeypatch, step: int, rank: int, action, method: str = "_train_on") -> None:
    """Let one process do something after a number of finished steps, before its next one."""
    original = getattr(Trainer, method, lambda self, *args: None)

    def patched(self, *args):
        if self.step == step and self.processes.rank == rank:
            action()
        return original(self, *args)

    monkeypatch.setattr(Trainer, method, patched, raising=False)


def test_losses_that_are_not_finite_end_all_processes(data, tmp_path, monkeypatch):
    """One process alone has the bad gradient; the state before the step is saved."""

    def spoil(self, batch):
        loss, terms = differentiate(self, batch)
        if self.step == 3 and self.processes.rank == 1:
            self.trained.parameters[0].grad.fill_(float("nan"))
        return loss, terms

    differentiate = Trainer._differentiate
    monkeypatch.setattr(Trainer, "_differentiate", spoil)
    ended = train_together(run_options(data, tmp_path / "run"), tmp_path)
    assert all(ended.statuses)
    assert "step 4 " in ended.texts[0]
    assert "is not finite" in ended.texts[0]
    state = load_state(tmp_path / "run" / "last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["potential"].values())


@pytest.mark.slow
def test_processes_with_other_options_are_refused(data, tmp_path):
    def work(rank):
        values = run_options(data, tmp_path / "run", learning_rate=1e-3 * (rank + 1))
        train(RunConfig.model_validate(values))

    ended = together(work, tmp_path)
    assert all(ended.statuses)
    assert "process 1 of 2" in ended.texts[0]
    assert "data and options are not those of process 0" in ended.texts[0]


# --- division of batches, launchers


def test_balanced_parts():
    costs = np.array([5, 5, 4, 4, 3, 3, 3])
    parts = balanced(range(7), costs, 3)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert max(costs[part].sum() for part in parts) == 11  # Graham's example, in which 9 would be possible
    assert balanced([6, 0], costs, 3) == [[0], [6], []]
    assert least([[0], [6], []], costs) == 2


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
            "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
         "SLURM_JOB_ID": "123456", "MASTER_ADDR": "node1"}  # fmt: skip


@pytest.fixture
def launcher(monkeypatch):
    """Function that sets the variables of a launcher and no others."""

    def set_(values):
        for name in {**TORCHRUN, **SLURM}:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_


def test_launchers(launcher):
    launcher({})
    assert launched() is None
    launcher(TORCHRUN)
    assert launched()[:7] == (3, 4, 1, 2, "node1", 1234, True)
    launcher(SLURM)
    assert launched()[:7] == (3, 4, 1, 2, "node1", 23456, False)
    launcher(SLURM | TORCHRUN)  # torchrun, started by srun on each node
    assert launched().port == 1234
    launcher({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NUM_TASKS"})  # in sbatch, outside of srun
    assert launched() is None
    launcher(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})
    assert launched() is None
    launcher({k: v for k, v in SLURM.items() if k != "MASTER_ADDR"})
    with pytest.raises(ValueError, match=r"4 processes on 2 nodes .* export MASTER_ADDR="):
        launched()
    launcher({k: v for k, v in (SLURM | {"SLURM_STEP_NUM_NODES": "1"}).items() if k != "MASTER_ADDR"})
    assert launched().host == "127.0.0.1"
    launcher(TORCHRUN | {"RANK": "x"})
    with pytest.raises(ValueError, match="RANK = 'x'"):
        launched()


def test_work_of_one_process_is_refused_in_several(launcher, data, tmp_path):
    launcher(TORCHRUN)
    config = RunConfig.model_validate(run_options(data, tmp_path / "run"))
    with pytest.raises(ValueError, match="a dry run is done by one process, got 4"):
        dry_run(config, SILENT)
    with pytest.raises(ValueError, match="a committee is done by one process, got 4"):
        train_committee(config, 2, console=SILENT)
    for used in ("data.replay", "training on .aselmdb files"):
        with pytest.raises(ValueError, match=f"^{used} needs a single process"):
            Processes(launched()).refuse_with(True, used)


# --- the commands


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "dpa4", "train", str(file), *options]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler alone takes minutes
def test_torchrun(data, tmp_path):
    """Compiled steps too; the numbers are those of the eager run in float32."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(data, tmp_path / "one", steps=3)))
    subprocess.run(command(file), check=True)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "dpa4",
    ]
    own = ["--set", f"output={tmp_path / 'two'}", "--set", "training.compile=true"]
    found = subprocess.run([*torchrun, *command(file, *own)[3:]], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("deviation from eager mode on the first batch") == 1
    a, b = (read_csv(tmp_path / name / "train.csv") for name in ("one", "two"))
    for row, other in zip(a, b, strict=True):
        assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)  # float32


@pytest.mark.slow
def test_srun(data, tmp_path):
    """Variables as Slurm sets them; without a launcher, process 0 holds the store."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(data, tmp_path / "run", steps=3)))
    shared = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            command(file),
            env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    assert "2 processes" in texts[0]
    assert not texts[1]
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 3
    assert torch.isfinite(load_state(tmp_path / "run" / "last.pt")["sums"]).all()
