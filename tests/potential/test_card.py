"""The model card describes a checkpoint or preset."""

import io
import json
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from dpa4.interfaces import DPA4Calculator
from dpa4.model.config import PairBridging, pair_names
from dpa4.model.presets import PRESETS, preset
from dpa4.model.so2 import FusedSO2Stack
from dpa4.ops import available, gate
from dpa4.ops.available import triton_version
from dpa4.ops.hopper import trial
from dpa4.potential import Potential, convert, fingerprint_of
from dpa4.potential.card import _sections, cpu_kernels, gpu_kernels, has_whole_stacks, model_card, unsupported
from dpa4.potential.checkpoint import save_potential
from dpa4.potential.deepmd.writer import export_deepmd
from helpers import random_potential, shared, small_potential


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_potential(random_potential(fitting=(24, 40)), path, {"data": "train [first half].xyz"})
    return path


def line(text, label):
    (found,) = [
        row.split(None, len(label.split()))[-1]
        for row in text.splitlines()
        if row.split("  ")[1:2] == [label]
    ]
    return found


def test_presets_show_the_published_size():
    text = model_card("paper-air").text
    assert line(text, "trainable parameters") == "2,762,885"
    assert line(text, "elements").startswith("118: H He Li")
    assert line(text, "preset") == "paper-air"


def test_card_in_a_notebook(tmp_path):
    save_potential(random_potential(), tmp_path / "m.safetensors", {"data": "<script>alert(1)</script>"})
    html = model_card(tmp_path / "m.safetensors")._repr_html_()
    assert "&lt;script&gt;" in html and "<script" not in html
    for text in ("DPA4 potential m.safetensors", "Switches, default", "reference energies", "cutoff"):
        assert text in html


def test_generation_version_and_parameters_of_presets():
    text = model_card("DPA4-mini-v20260911").text
    assert line(text, "generation") == "3"
    assert line(text, "version") == "dpa4-mini-v20260911"
    assert line(text, "parameters") == "655,052"
    assert line(text, "trainable parameters") == "655,036; 16 centres of the radial basis are fixed"
    assert line(model_card("paper-neo").text, "generation") == "1"
    assert line(model_card("nano").text, "version") == "nano"


@pytest.mark.parametrize(
    ("options", "generation", "published"),
    [
        ({}, "2", "dpa4-nano-v20260820"),
        ({"edge_norm": False, "cutoff": 4.5}, "2", "none; nano with cutoff = 4.5"),
        ({"channels": 8, "n_radial": 4, "lmax": 2, "radial_mlp": [8]}, "2", "none, no preset is close"),
        (
            {"n_radial": 6, "basis": "bessel/fix"},
            "3",
            "none; dpa4-nano-v20260820 with n_radial = 6, basis = bessel/fix",
        ),
    ],
)
def test_generation_version_and_parameters_of_own_and_imported_models(
    tmp_path, options, generation, published
):
    own, exported = tmp_path / "model.safetensors", tmp_path / "model.pt"
    potential = Potential(preset("dpa4-nano-v20260820", ("H", "O"), **options), {})
    save_potential(potential, own)
    files = [own]
    if generation == "2":  # the release of deepmd-kit has the switches
        export_deepmd(potential, exported)
        files.append(exported)
    count = sum(p.numel() for p in potential.parameters())
    fixed = "; 6 frequencies of the radial basis are fixed" if generation == "3" else ""
    for text in (model_card(file).text for file in files):
        assert (line(text, "generation"), line(text, "version")) == (generation, published)
        assert line(text, "parameters") == f"{count:,}"
        assert line(text, "trainable parameters") == f"{count - 6 * bool(fixed):,}{fixed}"


@pytest.mark.parametrize(
    ("fixture", "generation", "published", "fixed"),
    [
        ("E_june2026_mini", "2", "none; dpa4-mini-v20260820 with channels = 16", 0),
        ("E_v0901_neo", "3", "dpa4-neo-v20260901", 0),
        ("E_v0911_mini", "3", "dpa4-mini-v20260911", 16),
    ],
)
def test_checkpoints_of_deepmd_are_recognised(fixture, generation, published, fixed):
    folder = shared(f"reference/fixtures-gen3/{fixture}")
    count = json.loads((folder / "meta.json").read_text())["n_params"]
    text = model_card(folder / "model_f32.pt").text
    assert (line(text, "generation"), line(text, "version")) == (generation, published)
    assert line(text, "parameters") == f"{count:,}"
    assert line(text, "trainable parameters").split(";")[0] == f"{count - fixed:,}"


def test_files_show_parameters_energies_units_and_provenance(saved):
    text = model_card(saved).text
    parameters = sum(p.numel() for p in random_potential(fitting=(24, 40)).parameters())
    assert line(text, "trainable parameters") == f"{parameters:,}"
    assert line(text, "elements") == "3: H C O"
    assert line(text, "cutoff") == "4 Å"
    assert line(text, "precision") == "float64"
    assert line(text, "reference energies") == "H -0.500000, C -1.500000, O 0.000000 eV"
    assert "eV/Å³" in line(text, "units")
    assert line(text, "data") == "train [first half].xyz"
    assert line(text, "format") == "model file of dpa4, format 1"


def test_switches_that_differ_from_the_defaults_come_first(saved):
    different, default = model_card(saved).text.split("Switches, default")
    assert line(different, "fitting") == "(24, 40)"
    assert line(different, "channels") == "8"
    assert line(default, "mmax") == "1"
    assert "fitting" not in default


def test_the_card_tells_which_kernels_a_gpu_has_for_the_model(saved, monkeypatch):
    monkeypatch.setattr("dpa4.ops.available.triton_version", lambda: "3.6.0")
    text = model_card(saved).text
    assert line(text, "SO(2) layers") == "fused, Triton kernels"
    assert line(text, "Triton") == "3.6.0"
    monkeypatch.setattr("dpa4.ops.available.triton_version", lambda: None)
    assert line(model_card(saved).text, "Triton") == "not installed; without it no model runs on a GPU"
    save_potential(random_potential(mlp_bias=True), saved)
    assert "mlp_bias = True" in line(model_card(saved).text, "SO(2) layers")


def test_the_card_tells_which_kernels_this_cpu_has_for_the_model(monkeypatch):
    monkeypatch.setattr("dpa4.ops.available.cpp_missing", lambda: None)

    def on_cpu(**switches) -> tuple[str, str]:
        lines = cpu_kernels(preset("mini", ("H",), **switches))
        return lines["edges, nodes and grids"], lines["layers of SO(2)"]

    assert on_cpu() == ("C++ kernels", "C++ kernels, all layers at once")
    assert on_cpu(channels=24)[0] == (
        "plain operations (channels 24, channels of a focus 24: not a multiple of 16)"
    )
    assert on_cpu(n_atten_head=4) == (
        "plain operations (channels of an attention head 8: not a multiple of 16)",
        "C++ kernels, all layers at once",
    )
    assert on_cpu(mlp_bias=True) == ("C++ kernels", "plain operations (not with mlp_bias = True)")
    monkeypatch.setattr("dpa4.ops.available.cpp_missing", lambda: "no compiler")
    assert on_cpu() == ("plain operations (no compiler)",) * 2
    assert "On this CPU" in model_card("mini").text


MAX = {"channels": 96, "lmax": 6, "n_blocks": 8, "n_focus": 2, "radial_so2_rank": 4}
ULTRA = {"channels": 128, "lmax": 6, "n_blocks": 10, "n_focus": 3, "radial_so2_rank": 4, "ffn_on": "s2"}


def test_the_card_tells_what_wide_models_get(monkeypatch):
    monkeypatch.setattr(available, "cpp_missing", lambda: None)
    hopper = "energies and forces on H100, H200"
    other = "as above; the CUDA kernel for whole stacks has focus streams 1 (here "
    for switches, shape, edges in (
        (MAX, "2), channels 64 (here 96), degree 3 (here 6)", "73,584; "),
        (ULTRA, "3), channels 64 (here 128), degree 3 (here 6)", "36,792; "),
    ):
        config = preset("plus", ("H",), **switches)
        lines = gpu_kernels(config, "3.6.0")
        assert lines["SO(2) layers"] == "fused, Triton kernels"
        assert lines[hopper] == f"{other}{shape}" and lines["edges at once"].startswith(edges)
        assert set(cpu_kernels(config).values()) == {"C++ kernels", "C++ kernels, all layers at once"}
    lines = gpu_kernels(preset("plus", ("H",), channels=256), "3.6.0")
    assert lines["SO(2) layers"] == (
        "fused, Triton kernels; gates in plain operations (256 channels of a focus, at most 128)"
    )
    lines = gpu_kernels(preset("paper-air"), "3.6.0")
    assert lines[hopper] == "one CUDA kernel for all SO(2) layers of a block"
    assert lines["edges at once"].startswith("262,144; ")
    assert gpu_kernels(preset("paper-air", mlp_bias=True), "3.6.0")[hopper] == "as above"
    assert gpu_kernels(preset("paper-air", mixing_layers=10), "3.6.0")[hopper].endswith("1 to 9 (here 10)")
    assert "feed-forward networks 40" in cpu_kernels(preset("mini", ffn_neurons=40))["edges, nodes and grids"]


@pytest.mark.parametrize("channels", [96, 128, 129, 256])
def test_gates_have_the_kernels_of_the_card(channels, monkeypatch):
    """The launch is recorded; the tensors are on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(available, "triton", lambda x: True)
    u, weights = torch.zeros(1, 2, 4 * channels), torch.zeros(1, channels, channels)
    found = gate._kernels(u, weights) is not None
    fused = gpu_kernels(preset("nano", channels=channels), "3.6.0")["SO(2) layers"]
    assert found == (fused == "fused, Triton kernels") == (channels <= 128)


@pytest.mark.parametrize("symmetry", ["SO3", "O3"])
@pytest.mark.parametrize("name", PRESETS)
def test_models_with_whole_stacks_are_those_that_get_them(name, symmetry, monkeypatch):
    monkeypatch.setattr(available, "is_hopper", lambda device: True)
    monkeypatch.setattr(trial, "whole_stacks_work", lambda device: True)
    config = preset(name, ("H",), n_blocks=2, symmetry=symmetry)
    found = set()
    for block in Potential(config).float().model.blocks:
        stack, conv = block.conv.stack, block.conv
        x = torch.empty(conv.n_focus, 3, stack.layout.total * conv.width)
        separate = config.symmetry == "O3"
        found.add(available.whole_stack(x, len(stack.linears), stack.layout, separate))
    assert found == {has_whole_stacks(config)}


def test_the_card_says_the_symmetry():
    for name, symmetry, energies, kernel in (
        ("paper-air", "SO3", "may differ", "one CUDA kernel for all SO(2) layers of a block"),
        (
            "paper-air",
            "O3",
            "are equal",
            "as above; the CUDA kernel for whole stacks has symmetry SO3 (here O3)",
        ),
    ):
        sections = _sections(preset(name, ("H",), symmetry=symmetry))
        assert sections["Model"]["symmetry"] == f"{symmetry}: energies of mirror images {energies}"
        assert not any("symmetry" in sections[f"Switches, {which}"] for which in ("default", "not default"))
        assert sections["On a GPU"]["energies and forces on H100, H200"] == kernel
    scalars = _sections(preset("paper-air", ("H",), lmax=0, kmax=0))
    assert scalars["Model"]["symmetry"] == "SO3: energies of mirror images are equal"


@pytest.mark.parametrize("switches", [{}, {"mlp_bias": True}, {"layer_scale": True}])
def test_reasons_are_those_by_which_the_network_chooses_its_layers(switches):
    potential = random_potential(**switches)
    reasons = unsupported(potential.config)
    fused = {type(block.conv.stack) is FusedSO2Stack for block in potential.model.blocks}
    assert fused == {not reasons}
    assert [reason.partition(" = ")[0] for reason in reasons] == list(switches)


def test_published_models_have_all_kernels():
    assert not any(unsupported(preset(name)) for name in PRESETS)


def test_the_version_of_triton_is_that_of_the_package():
    assert triton_version() == (version("triton") if find_spec("triton") else None)


def test_checkpoints_of_deepmd_kit_have_a_card(saved):
    export_deepmd(random_potential().to(torch.float32), saved.with_suffix(".pt"))
    text = model_card(saved.with_suffix(".pt")).text
    assert line(text, "format") == "deepmd-kit checkpoint, descriptor format 1.2"
    assert line(text, "precision") == "float32"


def test_the_terminal_shows_the_same_lines(saved):
    console = Console(width=300, file=io.StringIO())
    console.print(model_card(saved))
    shown = console.file.getvalue()
    for row in model_card(saved).text.splitlines()[2:]:
        for part in row.strip().split("  "):
            assert part.strip() in shown


def test_unknown_names_are_told_apart_from_missing_files(tmp_path):
    with pytest.raises(
        ValueError,
        match="'papr-air' is neither a file nor a preset: unknown preset .*did you mean 'paper-air'",
    ):
        model_card("papr-air")
    with pytest.raises(FileNotFoundError, match="there is no model file .*absent.safetensors"):
        model_card(tmp_path / "absent.safetensors")


def test_windows_of_many_elements_are_cut():
    elements = ("H", "C", "N", "O", "Si")
    ends = {name: 0.5 + k / 10 for k, name in enumerate(pair_names(elements))}
    assert PairBridging(outer=ends, frozen=0.7, full=ends).text == (
        "repulsion of nuclei from H-H 0.500, H-C 0.600, H-N 0.700, H-O 0.800, H-Si 0.900, C-C 1.000, C-N 1.100, "
        "C-O 1.200, C-Si 1.300, N-N 1.400, N-O 1.500, N-Si 1.600 Å and 3 more pairs inwards, alone from 0.7 of that"
    )


def test_one_fingerprint_everywhere(tmp_path):
    """Card, calculator and resumable runs show the same, also for a converted copy."""
    potential = random_potential(n_blocks=1, lmax=1, bridging=None)
    save_potential(potential, tmp_path / "a.safetensors", {"note": "the first"})
    save_potential(potential.double(), tmp_path / "b.safetensors", {"note": "the second"})
    convert(tmp_path / "a.safetensors", tmp_path / "c.pt")
    calculator = DPA4Calculator(tmp_path / "a.safetensors", device="cpu")
    expected = calculator.parameters["model"]
    assert expected == fingerprint_of(calculator.potentials[0])["model"]
    for name in ("a.safetensors", "b.safetensors", "c.pt"):
        assert model_card(tmp_path / name).sections["Provenance"]["fingerprint"] == expected, name


def test_options_of_the_training_run_are_lines_of_their_own(tmp_path):
    options = {"training": {"seed": 3, "patience": None}, "data": {"train": ["a.xyz", "b.xyz"], "keys": {}}}
    save_potential(small_potential(), tmp_path / "a.safetensors", {"options": json.dumps(options), "x": "{"})
    card = model_card(tmp_path / "a.safetensors")
    assert card.sections["Training run, options"] == {
        "training.seed": "3",
        "training.patience": "null",
        "data.train": "a.xyz, b.xyz",
        "data.keys": "{}",
    }
    assert card.sections["Provenance"]["x"] == "{" and '{"' not in card.text
