"""Thousands of damaged, edited and hostile files of every format that is read.

None may hang, need 2 GB, crash or end in a traceback. A damaged checkpoint is never taken for the original. Data that
are read have finite labels. The random numbers are seeded by the case, so a fault can be repeated alone.
"""

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from fuzz_workers import Target, faults
from mutations import VALUES, mutated_bytes, mutated_value
from safetensors import safe_open
from safetensors.torch import load_file, save

from deepmd_files import as_pt_expt, composed_form, parameter_names
from dpa4.data import read_frames
from dpa4.data.coverage import Coverage
from dpa4.model.config import Bridging, PairBridging, pair_names
from dpa4.potential import fingerprint_of, model_card
from dpa4.potential.checkpoint import load_potential, save_potential
from dpa4.potential.deepmd.layouts import is_derived
from dpa4.potential.deepmd.writer import deepmd_state
from dpa4.training import convert_input
from dpa4.training.run_file import default_config_text, load_run_config
from dpa4.training.state import STATE_FORMAT, check_fits, load_state
from helpers import graph_of, molecule, random_potential
from kept_files import state_file

CASES = 5000
Make = Callable[[random.Random, Path], Path]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def tiny_potential(**options):
    """Potential of a few thousand weights."""
    potential = random_potential(
        channels=4,
        n_radial=4,
        n_blocks=1,
        lmax=1,
        mixing_layers=1,
        use_env_seed=False,
        ffn_neurons=4,
        **options,
    ).float()
    potential.coverage = Coverage(4.0, ("H", "C", "O"), {("H", "H"): 0.74, ("H", "O"): 0.95})
    return potential


def check(target: Target, tmp_path: Path, seed: int) -> None:
    """Run all cases; more than half of them must be refused, or the mutations would test nothing."""
    found, outcomes = faults(target, CASES, seed, tmp_path)
    assert not found, f"{len(found)} faults in {outcomes}:\n" + "\n".join(found[:40])
    assert sum(outcomes.values()) == CASES
    assert outcomes["refused"] > CASES / 4, outcomes


def fault_of_energy(potential) -> str | None:
    """Fault of a potential, if its energy or forces of a molecule are not finite."""
    if not {"H", "C", "O"} <= set(potential.elements) or potential.config.charge_spin:
        return None
    result = potential(graph_of(molecule(), potential.config.cutoff))
    finite = bool(result.energy.isfinite().all() and result.forces.isfinite().all())
    return None if finite else f"energy {result.energy.item()}"


def file_maker(name: str, content: Callable[[random.Random], bytes]) -> Make:
    """Function that writes one file."""

    def make(rng: random.Random, folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content(rng))
        return path

    return make


# Checkpoints


def test_native_checkpoints(tmp_path):
    path = tmp_path / "original.safetensors"
    windows = dict.fromkeys(pair_names(("H", "C", "O")), 0.7)
    bridging = PairBridging(outer=windows, frozen=0.6, full=dict.fromkeys(windows, 0.1))
    save_potential(tiny_potential(bridging=bridging), path, {"data": "water.xyz"})
    original, same = path.read_bytes(), fingerprint_of(load_potential(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def header(rng: random.Random) -> bytes:
        """Edit names, types, shapes and places of the tensors."""
        size = int.from_bytes(original[:8], "little")
        text = json.dumps(mutated_value(rng, json.loads(original[8 : 8 + size])))
        return len(text.encode()).to_bytes(8, "little") + text.encode() + original[8 + size :]

    def unsigned(rng: random.Random) -> bytes:
        """Edit the description or the tensors of a file without a digest, as earlier versions wrote them."""
        texts = {key: text for key, text in metadata.items() if key != "digest"}
        content = dict(tensors)
        if rng.random() < 0.7:
            key = rng.choice(("config", "config", "config", "coverage", "provenance", "elements"))
            texts[key] = json.dumps(mutated_value(rng, json.loads(texts[key])))
        else:
            name = rng.choice(sorted(content))
            content[name] = mutated_tensor(rng, content[name])
        return save(content, texts)

    def signed(rng: random.Random) -> bytes:
        """Edit a weight, exchange two, or edit the description; the digest stays."""
        texts, content = dict(metadata), dict(tensors)
        name, other = rng.sample(sorted(content), 2)
        action = rng.random()
        if action < 0.3:
            content[name] = content[name] * (1 + 1e-3)
        elif action < 0.6:
            content[name], content[other] = content[other].clone(), content[name].clone()
        else:
            key = rng.choice(sorted(texts))
            texts[key] = rng.choice(
                (texts[key].replace("4", "5"), texts[key][:-1], texts[key] + " ", "{}", "")
            )
        return save(content, texts)

    def content(rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.5:
            return mutated_bytes(
                rng, original, head=len(original) - 4 * sum(t.numel() for t in tensors.values())
            )
        return (header if kind < 0.65 else unsigned if kind < 0.85 else signed)(rng)

    def accept(potential: object, path: Path) -> str | None:
        model_card(path)
        with safe_open(path, "pt") as file:
            is_signed = "digest" in file.metadata()
        if is_signed and fingerprint_of(potential) != same:
            return "a changed model was taken for the original"
        return fault_of_energy(potential)

    check(Target(file_maker("model.safetensors", content), load_potential, accept), tmp_path, 20251)


def mutated_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Tensor with other values, another type or another shape."""
    value = tensor.clone()
    numbers = value if value.is_floating_point() else value.double()
    dtype = rng.choice((torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64))
    return rng.choice(
        (
            lambda: numbers.flatten().index_fill(
                0, torch.tensor([0]), rng.choice((float("nan"), float("inf"), 1e30))
            ),
            lambda: value.to(dtype),
            lambda: value[None].clone(),
            lambda: torch.cat([value.flatten(), value.flatten()]),
            lambda: value.flatten()[:1].clone(),
            lambda: torch.zeros(0),
            lambda: value * 1e4,
        )
    )()


@pytest.mark.parametrize(("layout", "seed"), [("pt", 77), ("pt_expt", 94)])
def test_deepmd_checkpoints(tmp_path, layout, seed):
    """Both layouts. In the second, the averages are read, and the options have their composed form and vacuum_ref."""
    potential = tiny_potential(bridging=Bridging(smooth_cutoff=False) if layout == "pt_expt" else None)
    state = deepmd_state(potential)
    ema = {"decay": 0.999, "model": {}, "validation_state": {}}
    if layout == "pt_expt":
        params = state["_extra_state"]["model_params"]
        params["fitting_net"]["vacuum_ref"] = True
        params["preset_out_bias"] = {"energy": [-13.25, None, -2041.75]}
        state["_extra_state"]["model_params"] = composed_form(params)
        state = as_pt_expt(state)
        ema["model"] = {
            name.removeprefix("model.Default."): state[name]
            for name in parameter_names(state)
            if not is_derived(name.removeprefix("model.Default.atomic_model."))
        }

    def whole(changed: dict, averages: object = ema) -> dict:
        return {"model": changed} | ({"ema": averages} if layout == "pt_expt" else {})

    original = saved(whole(state))
    names = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.numel()]

    def entries(rng: random.Random) -> bytes:
        """Change entries of the archive; their checksums are right."""
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(out, "w") as new:
            infos = old.infolist()
            chosen = (
                next(i for i in infos if i.filename.endswith("data.pkl"))
                if rng.random() < 0.7
                else rng.choice(infos)
            )
            action = rng.random()
            for info in infos:
                data, name = old.read(info), info.filename
                if info is chosen and action < 0.8:
                    data = mutated_bytes(rng, data, head=len(data))
                elif info is chosen and action < 0.85:
                    continue
                elif info is chosen and action < 0.9:
                    name = rng.choice((f"{name}x", "../x", "constants.pkl", "x", rng.choice(infos).filename))
                packed = info is chosen and action > 0.95
                new.writestr(name, data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
            if rng.random() < 0.1:
                new.writestr("archive/bomb", bytes(10**7), zipfile.ZIP_DEFLATED)
        return out.getvalue()

    def options(rng: random.Random) -> bytes:
        params = mutated_value(rng, state["_extra_state"]["model_params"])
        extra = {
            "model_params": params,
            "train_infos": rng.choice(({}, {"step": 3}, None, [1], {"step": "x"})),
        }
        return saved(whole(state | {"_extra_state": extra}))

    def weights(rng: random.Random) -> bytes:
        name, other = rng.sample(names, 2)
        value = state[name]
        changed = rng.choice(
            (
                lambda: {name: mutated_tensor(rng, value)},
                lambda: {name: mutated_tensor(rng, value)},
                lambda: {name: value.flatten()[:1].expand(10**5, 10**6)},
                lambda: {name: torch.zeros(3, 3).to_sparse()},
                lambda: {name: torch.empty(10**6, 10**6, device="meta")},
                lambda: {name: state[other], other: value},
                lambda: {name: rng.choice(VALUES)()},
                lambda: {f"{name}.lora_scaling": value, f"{name}x": value},
                lambda: {
                    f"{name.rpartition('.')[0]}.A_by_l": value,
                    f"{name.rpartition('.')[0]}.B_by_l": value,
                },
                lambda: {name.replace(".w", ".matrix"): value, f"{name}s": value},
            )
        )()
        return saved(whole(state | changed))

    def averages(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return saved(whole(state, mutated_value(rng, ema)))
        name = rng.choice(sorted(ema["model"]))
        return saved(
            whole(state, ema | {"model": ema["model"] | {name: mutated_tensor(rng, state[names[0]])}})
        )

    def content(rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.4:
            return mutated_bytes(rng, original, head=3000)
        if layout == "pt_expt" and kind < 0.5:
            return averages(rng)
        return (entries if kind < 0.6 else options if kind < 0.85 else weights)(rng)

    def read(path: Path) -> object:
        potential = load_potential(path)  # the weights that the card describes
        return load_potential(path, ema=True) if layout == "pt_expt" else potential

    def accept(potential: object, path: Path) -> str | None:
        model_card(path)
        return fault_of_energy(potential)

    check(Target(file_maker("model.pt", content), read, accept), tmp_path, seed)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except RecursionError:  # nested too deeply to be written
        return b"PK"
    return buffer.getvalue()


def test_training_states(tmp_path):
    original = gzip.decompress(state_file(STATE_FORMAT).read_bytes())
    kept = torch.load(io.BytesIO(original), weights_only=True)
    weights = {key: value.clone() for key, value in kept["potential"].items()}

    def content(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated_bytes(rng, original, head=3000)
        entry = rng.choice(sorted(kept))
        changed = mutated_value(rng, {entry: kept[entry]})
        return saved(kept | changed if isinstance(changed, dict) else changed)

    def read(path: Path) -> object:
        state = load_state(path)
        check_fits(state, weights, path)
        return state["potential"]

    def accept(found: object, path: Path) -> str | None:
        same = all(torch.equal(found[key], value) for key, value in weights.items())
        return None if same else "changed weights were taken for the original ones"

    check(Target(file_maker("last.pt", content), read, accept), tmp_path, 82)


# Run files


def test_run_files(tmp_path):
    texts = [
        default_config_text("train.xyz").encode(),
        b"model: {preset: mini, elements: [H, O], l_schedule: [2, 1], bridging: {r_inner: 0.5}}\n"
        b"data: {train: [a.xyz, b.xyz], reference_energies: {H: -13.6, O: -2041.8}, keys: {energy: E}}\n"
        b"training: {steps: 100, virial_weight: 3, ema_decay: null}\n",
    ]
    words = (b"&a ", b"*a", b"[", b"{", b"[" * 300, b"? ", b": ", b"- ", b"!!binary ", b"!!python/name:os.system ",
             b"<<: *a", b"'", b'"', b"%YAML 9\n---\n", b"\t", b"\xff", b"0x" + b"f" * 6000, b"1:" * 3000)  # fmt: skip

    def bomb(rng: random.Random) -> bytes:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, rng.randint(2, 12))]
        return "\n".join(lines).encode()

    def content(rng: random.Random) -> bytes:
        text, kind = rng.choice(texts), rng.random()
        if kind < 0.4:
            return mutated_bytes(rng, text, head=len(text))
        if kind < 0.6:
            at = rng.randint(0, len(text))
            return text[:at] + rng.choice(words) + text[at:]
        if kind < 0.63:
            return bomb(rng)
        text = json.dumps(
            mutated_value(rng, yaml.safe_load(text)), ensure_ascii=False
        )  # which is YAML as well
        return text.replace("NaN", ".nan").replace("Infinity", ".inf").encode("utf-8", "surrogatepass")

    def accept(config: object, path: Path) -> str | None:
        return None if config.model_dump_json() else "empty"

    check(Target(file_maker("run.yaml", content), load_run_config, accept), tmp_path, 78)


def test_training_inputs_of_deepmd(tmp_path):
    original = {
        "model": {
            "preset": "dpa4-nano-v20260911",
            "type_map": ["O", "H"],
            "descriptor": {
                "rcut": 5.0,
                "edge_norm": [False, True, True],
                "env_exp": 5,
                "sel": 100,
                "use_amp": True,
            },
            "fitting_net": {"neuron": [0], "atom_ener": [None, None]},
            "bridging_method": "ZBL",
            "preset_out_bias": {"energy": [-2.0, -1.0]},
        },
        "learning_rate": {
            "type": "exp",
            "start_lr": 1e-3,
            "stop_lr": 1e-6,
            "decay_rate": 0.9,
            "warmup_steps": 100,
        },
        "loss": {"type": "ener", "loss_func": "mse", "use_huber": True, "huber_delta": [0.1, 0.2, 0.3]},
        "optimizer": {"type": "HybridMuon", "weight_decay": 0.001, "momentum": 0.95},
        "training": {
            "training_data": {"systems": ["a", "b.hdf5#c"], "batch_size": "auto:32", "sys_probs": [0.5, 0.5]},
            "validation_data": {"systems": "c", "numb_btch": 3},
            "numb_steps": 1000,
            "seed": 3,
        },
    }
    text = json.dumps(original)

    def content(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutated_bytes(rng, text.encode())
        return json.dumps(mutated_value(rng, original)).encode("utf-8", "surrogatepass")

    def translate(path: Path) -> object:
        return convert_input(path, path.with_suffix(".yaml"))

    def accept(translated: object, path: Path) -> str | None:
        load_run_config(path.with_suffix(".yaml"))
        return None

    check(Target(file_maker("input.json", content), translate, accept), tmp_path, 79)


# Data


def images() -> list[Atoms]:
    """Two labelled molecules and a crystal."""
    found = [
        Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]),
        Atoms("OH2", [[0, 0, 0.1], [0.76, 0.62, 0], [-0.76, 0.59, 0]]),
        Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]], cell=[4, 4, 5], pbc=True),
    ]
    for k, atoms in enumerate(found):
        stress = {"stress": np.linspace(0, 0.01, 6)} if atoms.pbc.any() else {}
        atoms.calc = SinglePointCalculator(atoms, energy=-14.0 - k, forces=np.full((3, 3), 0.1 * k), **stress)
    return found


def finite_labels(frames: object, path: Path) -> str | None:
    """Fault of frames that were read from a mutated file."""
    for frame in frames:
        numbers = [frame.positions, frame.cell, frame.weight]
        numbers += [label for label in (frame.energy, frame.forces, frame.virial) if label is not None]
        if not all(np.isfinite(value).all() for value in numbers):
            return f"{frame.origin} has numbers that are not finite"
        if len(frame) == 0 or frame.positions.shape != (len(frame), 3):
            return f"{frame.origin} has positions of shape {frame.positions.shape}"
        if frame.forces is not None and frame.forces.shape != frame.positions.shape:
            return f"{frame.origin} has forces of shape {frame.forces.shape}"
    return None


def test_extended_xyz(tmp_path):
    ase.io.write(tmp_path / "original.xyz", images())
    text = (tmp_path / "original.xyz").read_bytes()
    words = (b"Lattice=\"1 0 0\" ", b"Properties=species:S:1:pos:R:900000000 ", b"energy=nan ", b"999999999\n", b"=",
             b'"', b"{", b"pbc=\"T F\" ", b"stress=\"1 2 3\" ", b"charge=1e400 ", b"\x00", b"\xff\xfe", b"\n\n",
             b"virial=[[1,2],[3]] ", b"config_weight=inf ", b"energy=[1,2] ", b"move_mask=x ", b"X ")  # fmt: skip

    def content(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return mutated_bytes(rng, text, head=200)
        at = rng.randint(0, len(text))
        return text[:at] + rng.choice(words) + text[at:]

    check(Target(file_maker("data.xyz", content), read_frames, finite_labels), tmp_path, 79)


def test_deepmd_systems(tmp_path):
    frames = images()[:2]
    original: dict[str, bytes] = {"type.raw": b"0\n1\n1\n", "type_map.raw": b"O\nH\n"}
    arrays = {
        "coord": np.array([a.positions for a in frames]).reshape(2, -1),
        "force": np.array([a.get_forces() for a in frames]).reshape(2, -1),
        "energy": np.array([a.get_potential_energy() for a in frames]),
        "box": np.tile(np.diag([9.0, 9.0, 9.0]).ravel(), (2, 1)),
    }
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        original[f"set.000/{name}.npy"] = buffer.getvalue()

    def make(rng: random.Random, folder: Path) -> Path:
        system = folder / "system"
        (system / "set.000").mkdir(parents=True)
        chosen = rng.choice(sorted(original))
        for name, data in original.items():
            if name != chosen:
                (system / name).write_bytes(data)
            elif rng.random() < 0.6 or not name.endswith("npy"):
                (system / name).write_bytes(mutated_bytes(rng, data, head=128))
            elif rng.random() < 0.9:
                with open(system / name, "wb") as file:
                    np.save(file, other_array(rng, arrays[Path(name).stem]))
        return system

    check(Target(make, read_frames, finite_labels), tmp_path, 80)


def other_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Array of another type or shape, or with numbers that are not finite."""
    bad = array.copy()
    bad.flat[0] = rng.choice((np.nan, np.inf, -np.inf, 1e300))
    kind = rng.choice(("f2", "c16", "i8", "bool", "U5", "M8[s]", "O", "f8,f8"))
    return rng.choice(
        (
            lambda: bad,
            lambda: array.astype(kind) if kind not in ("f8,f8",) else np.zeros(2, kind),
            lambda: array[:1],
            lambda: array.ravel()[:3],
            lambda: np.zeros((0, 9)),
            lambda: np.zeros(()),
            lambda: np.concatenate([array, array]),
            lambda: array[None],
        )
    )()


def test_aselmdb_databases(tmp_path):
    pytest.importorskip("ase_db_backends", reason="needs ase-db-backends")
    with ase.db.connect(tmp_path / "original.aselmdb", type="aselmdb") as database:
        for atoms in images():
            database.write(atoms, config_type="known", data={"charge": 0, "spin": 1})
    data = (tmp_path / "original.aselmdb").read_bytes()

    def content(rng: random.Random) -> bytes:
        """Change bytes of the pages in use, most of which lie behind the first two."""
        return mutated_bytes(rng, data, head=rng.choice((200, 8192, len(data))))

    check(Target(file_maker("data.aselmdb", content), read_frames, finite_labels), tmp_path, 81)


def test_a_fault_of_every_kind_is_found(tmp_path):
    """The harness itself: a reader that hangs, crashes, takes memory, is silent or says too little."""
    import os
    import time

    def read(path: Path) -> object:
        case = int(path.parent.name.removeprefix("case"))
        if case == 0:
            time.sleep(60)
        if case == 1:
            os.abort()
        if case == 2:
            bytearray(4 * 2**30)
        if case == 3:
            raise KeyError("x")
        if case == 4:
            raise ValueError("something is wrong")
        if case == 5:
            raise ValueError(f"{path}\nis wrong")
        if case == 6:
            raise ValueError(f"{path} is wrong")
        return case

    target = Target(
        file_maker("f", lambda rng: b""), read, lambda case, path: "silent" if case == 7 else None
    )
    found, outcomes = faults(target, 10, 0, tmp_path)
    texts = " ".join(sorted(found))
    for case, word in enumerate(("no end after", "crashed with SIGABRT", "out of memory", "traceback: KeyError",
                                 "not named", "several lines")):  # fmt: skip
        assert f"case {case}: " in texts and word in texts
    assert "case 7: silent" in texts and len(found) == 7
    assert outcomes == {"fault": 7, "refused": 1, "accepted": 2}
