"""Names of models: presets, folders, training states, and files on the Hugging Face hub (a local stand-in)."""

import sys
import threading
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.interfaces import ase as ase_interface
from dpa4.model.presets import DEEPMD_PRESETS, PRESETS
from dpa4.potential import convert, load_potential, model_card, save_potential
from dpa4.potential.model_file import model_file
from dpa4.training.state import save_state
from helpers import small_potential

NAME = "hf:atoms/water/models/small.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_potential(small_potential(), path)
    return path


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    return line


# Presets


@pytest.mark.parametrize("name", ["paper-air", "DPA4-Mini-v20260911"])
def test_preset_has_no_weights(name):
    message = (
        f"^{name} is a preset, an architecture without weights, and no preset has weights here; train it "
    )
    for load in (ase_interface.DPA4Calculator, load_potential):
        with pytest.raises(
            FileNotFoundError, match=message + rf"\(model.preset: {name}\).*docs/models.md, \"Published"
        ):
            load(name)


def test_every_preset_is_recognised():
    for name in PRESETS | DEEPMD_PRESETS:
        with pytest.raises(FileNotFoundError, match=f"^{name} is a preset"):
            model_file(name)


def test_a_file_with_the_name_of_a_preset_is_a_file(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    Path("mini").write_bytes(checkpoint.read_bytes())
    assert load_potential("mini").elements == small_potential().elements
    assert model_card("mini").title == "DPA4 potential mini"


def test_card_of_a_preset_says_where_weights_are():
    assert "none; docs/models.md" in model_card("paper-air").sections["Provenance"]["weights"]


# Folders and states of runs


@pytest.fixture
def run_folder(tmp_path, monkeypatch, checkpoint) -> Path:
    """Folder of a run, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    run.mkdir()
    for name in ("best.safetensors", "last.safetensors"):
        (run / name).write_bytes(checkpoint.read_bytes())
    save_state({"potential": {}, "optimizer": {}, "random": {}}, run / "last.pt")
    return run


BEST = (
    "take run/best.safetensors, the model with the lowest validation error so far (run/last.safetensors is the "
    "newest one)"
)
STATE = "error: run/last.pt is the state of a training run, from which --resume continues, not a model; "


def test_run_folder_and_state_name_the_file_to_take(run_folder):
    assert fails("info", "run") == f"error: run is the folder of a training run, not a model; {BEST}"
    assert fails("info", "run/last.pt") == f"{STATE}{BEST}"
    assert fails("eval", "run/last.pt", "x.xyz") == f"{STATE}{BEST}"
    (run_folder / "best.safetensors").unlink()
    assert fails("info", "run/last.pt") == (
        f"{STATE}take run/last.safetensors, the newest model; there is no best.safetensors yet"
    )
    (run_folder / "last.safetensors").unlink()
    assert fails("info", "run").endswith(
        "the run has not saved a model yet: continue it with dpa4 train run/run.yaml --resume"
    )


def test_other_folders(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert fails("info", "models") == (
        "error: models is a folder, not a model; name a model file; there is none in it"
    )
    Path("models/a.safetensors").write_bytes(checkpoint.read_bytes())
    assert fails("info", "models").endswith("name a model file, such as models/a.safetensors")


@pytest.mark.parametrize(
    "name", ["md", "relax", "eos", "elastic", "pairs", "check", "embed", "neb", "screen", "lammps"]
)
def test_every_command_says_so(run_folder, name):
    """The arguments after the model are files that exist, so that the model is the only fault."""
    Path("a.xyz").write_text("1\n\nH 0 0 0\n")
    others = {
        "md": ["a.xyz", "--steps", "1"],
        "pairs": [],
        "check": [],
        "neb": ["a.xyz", "a.xyz"],
        "lammps": ["a.xyz", "--elements", "H"],
    }
    arguments = others.get(name, ["a.xyz"])
    for module in {"screen": ["torch_sim"], "lammps": ["lammps"]}.get(name, []):
        pytest.importorskip(module, reason="an optional package")
    for model, text in (("run", "take run/best.safetensors"), ("paper-air", "paper-air is a preset")):
        assert text in fails(name, model, *arguments)


# The hub


@pytest.fixture
def hub(monkeypatch, checkpoint):
    """A stand-in for huggingface_hub that knows one file, and the calls it received."""
    calls = []

    def hf_hub_download(repo_id: str, filename: str) -> str:
        calls.append((repo_id, filename))
        if (repo_id, filename) != ("atoms/water", "models/small.safetensors"):
            raise RuntimeError("404 Client Error. (Request ID: 1)\n\nEntry Not Found for url: https://hub/x.")
        return str(checkpoint)

    monkeypatch.setattr(
        model_file_module(), "require", lambda *_: SimpleNamespace(hf_hub_download=hf_hub_download)
    )
    return calls


def model_file_module():
    return sys.modules["dpa4.potential.model_file"]


def test_file_on_the_hub_is_a_model_everywhere(hub, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    assert load_potential(NAME).elements == small_potential().elements
    assert model_file(Path(NAME)) == checkpoint
    calculator = ase_interface.DPA4Calculator([NAME, checkpoint], device="cpu")
    assert len(calculator.potentials) == 2
    convert(NAME, "copy.safetensors")
    card = model_card("copy.safetensors")
    assert card.sections["Provenance"]["parent file"] == NAME
    assert model_card(NAME).sections["Provenance"]["file"] == NAME
    assert CliRunner().invoke(app, ["info", NAME]).exit_code == 0
    assert set(hub) == {("atoms/water", "models/small.safetensors")}


def test_faults_on_the_hub(hub):
    with pytest.raises(
        OSError,
        match=r"^cannot download hf:atoms/ice/a.pt from the Hugging Face hub: 404 Client Error. \(Request ID: 1\) "
        "Entry Not Found for url: .*; check the name and the connection, or download the file and give its path$",
    ):
        load_potential("hf:atoms/ice/a.pt")
    for name in ("hf:", "hf:water", "hf:atoms/water", "hf:atoms/water/", "hf:/water/a.pt"):
        with pytest.raises(ValueError, match="must look like hf:organisation/repository/file"):
            load_potential(name)
    assert "error: cannot download hf:atoms/ice/a.pt" in fails("info", "hf:atoms/ice/a.pt")


def test_message_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub is not installed; pip install .*\[hub\]'"):
        load_potential(NAME)


def test_real_package_with_a_local_endpoint(checkpoint, tmp_path, monkeypatch):
    """The package itself downloads from a server on this machine, once: then the file is in its cache."""
    real = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    content = checkpoint.read_bytes()
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            requests.append(self.path)
            self.answer(content)

        def answer(self, body: bytes):
            known = self.path == "/atoms/water/resolve/main/models/small.safetensors"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            self.wfile.write(body if known else b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = partial(real.hf_hub_download, endpoint=endpoint, cache_dir=tmp_path)
    monkeypatch.setattr(model_file_module(), "require", lambda *_: SimpleNamespace(hf_hub_download=download))
    try:
        for _ in range(2):
            assert load_potential(NAME).elements == small_potential().elements
        assert len(requests) == 1
        with pytest.raises(OSError, match="cannot download hf:atoms/water/other.pt"):
            load_potential("hf:atoms/water/other.pt")
    finally:
        server.shutdown()
        server.server_close()


def test_a_missing_file_and_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()

    def message(name: str) -> str:
        with pytest.raises(FileNotFoundError) as raised:
            load_potential(name)
        return str(raised.value)

    assert message("run/best.pt") == (
        f"there is no model file run/best.pt; model files in {tmp_path / 'run'}: none"
    )
    for name in ("best.safetensors", "old.pt", "last.pt", "notes.txt", "x1.pt", "x2.pt", "x3.pt"):
        (tmp_path / "run" / name).touch()
    assert message("run/bset.safetensors").endswith("; did you mean run/best.safetensors?")
    assert message("run/model").endswith(f"in {tmp_path / 'run'}: best.safetensors, old.pt, x1.pt and 2 more")
    assert message("rum/best.pt").endswith(f"; there is no folder {tmp_path / 'rum'}")
    assert "make demo, at the top of the checkout, writes demo-run" in message("demo-run/training/a.pt")
