"""The report of a run: one valid page without external resources, even if parts are missing."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from rich.console import Console
from typer.testing import CliRunner

from dpa4 import __version__
from dpa4.cli import app
from dpa4.data import Coverage, read_frames
from dpa4.output import read_csv
from dpa4.potential import load_potential, model_card, save_potential
from dpa4.simulation import html as elements
from dpa4.simulation import phonons, relax_all, report_training, run_md, write_report
from dpa4.simulation.pair_curves import ADVICE, diagnose, pair_curves
from dpa4.training import evaluate, load_run_config, train
from dpa4.training.calibration import Calibration, write_calibration
from helpers import molecule, random_potential

PNG, SVG = "data:image/png;base64,", "data:image/svg+xml;base64,"
SECTIONS = ["summary", "learning-curve", "errors", "pair-curves", "model", "configuration", "versions"]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Parser that checks the nesting of elements and collects sections, text, images and references."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.images: list[str] = []
        self.references: list[str] = []
        self.words: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [
            v for k, v in attributes if k in ("src", "href", "action", "data", "poster", "srcset")
        ]
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "img":
            self.images.append(values["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.sections:
            self.words[self.sections[-1]] = self.words.get(self.sections[-1], "") + data


def page(path, sections=SECTIONS) -> Page:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://[^<\s]*\.(js|css|woff)|<script|<link|<iframe|@import|url\(", text)
    found = Page(text)
    links = [reference for reference in found.references if not reference.startswith((PNG, SVG))]
    assert links == [f"#{name}" for name in sections]
    for image in found.images:
        content = base64.b64decode(image.partition(",")[2], validate=True)
        if image.startswith(PNG):
            assert content.startswith(b"\x89PNG")
        else:
            assert b"prefers-color-scheme: dark" in content and b"http" not in links_of(content)
    assert found.sections == [*sections]
    return found


def links_of(svg: bytes) -> bytes:
    """References of an SVG file; rasters within it are part of it."""
    return b" ".join(re.findall(rb'href="(?!data:image/png;base64,)([^"]*)"', svg))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Finished run, and its evaluation on structures of two groups, one with a name that needs escaping."""
    folder = tmp_path_factory.mktemp("report")
    frames = []
    for seed in range(6):
        atoms = molecule(seed, 5)
        atoms.info |= {"REF_energy": 0.1 * seed, "config_type": "<b>&" if seed % 2 else "plain"}
        atoms.arrays["REF_forces"] = -atoms.positions
        frames.append(atoms)
    write(folder / "train.xyz", frames)
    (folder / "run.yaml").write_text(
        f"output: {folder / 'run'}\ndevice: cpu\n"
        "model: {channels: 8, lmax: 1, n_blocks: 1, mixing_layers: 1, cutoff: 4}\n"
        f"data: {{train: {folder / 'train.xyz'}, validation_fraction: 0.3}}\n"
        "training: {steps: 4, batch_size: 2, validation_interval: 2}\n"
    )
    best = train(load_run_config(folder / "run.yaml"), console=Console(quiet=True))
    evaluate(load_potential(best), read_frames(folder / "train.xyz"), output=folder / "eval")
    return folder


def test_a_whole_report(trained):
    file = write_report(trained / "run", evaluation=trained / "eval", device="cpu", progress=False)
    assert file == trained / "run" / "report.html"
    found = page(file)
    pairs = load_potential(trained / "run" / "best.safetensors").coverage.shortest
    assert len(found.images) == 2 + -(-len(pairs) // 3)  # learning curve, parity, three pairs to a figure
    words = found.words
    assert "trainable parameters" in words["model"] and "closest atoms" in words["model"]
    assert "validation score" in words["model"] and "score" in words["learning-curve"]
    assert "split_seed" not in words["model"]  # they are the configuration
    assert "<b>&" in words["errors"] and "meV/Å" in words["errors"]
    table = json.loads((trained / "eval" / "errors.json").read_text())
    assert {row["group"] for row in table} == {"all", "plain", "<b>&"}
    for row in table:
        shown = [f"{row[name]:.4g}" for name in ("mae", "rmse")]
        total = row["group"] == "all"
        if row["quantity"] != "energy" or total:
            assert all(number in words["errors"] for number in shown)
        assert not total or row["quantity"] == "energy" or shown[0] in words["summary"]
    validation = read_csv(trained / "run" / "valid.csv")
    best = [row for row in validation if row["best"] == "1"][-1]
    assert f"validation MAE, best (step {best['step']})" in words["summary"]
    assert f"energy MAE (meV/atom){float(best['energy_mae']):.4g}" in words["learning-curve"]
    assert all(image.startswith(SVG) for image in found.images)
    assert re.search(r"training time[\d.]+ s, without compilation", words["summary"])
    assert re.search(r"throughput[\d.]+ steps/s, [\d.]+ structures/s", words["summary"])
    worst = read_csv(trained / "eval" / "worst.csv")
    assert len(worst) == 6 and f"{float(worst[0]['forces_maximum']):.4g}" in words["errors"]
    assert "Worst structures" in words["errors"] and "train.xyz" in words["errors"]
    flagged = {flag for flag in ADVICE if f"{flag}{ADVICE[flag]}" in words["pair-curves"].replace("\n", "")}
    assert flagged == {flag for curve in pair_curves_of(trained) for flag in curve.flags}
    for a, b in pairs:
        assert f"{a}-{b}" in words["pair-curves"]
    assert "validation_fraction: 0.3" in words["configuration"]
    assert __version__ in words["versions"] and "PyTorch" in words["versions"]
    assert 'class="missing"' not in file.read_text()


def pair_curves_of(folder):
    potential = load_potential(folder / "run" / "best.safetensors")
    return [
        diagnose(curve) for curve in pair_curves(potential, report_training._pairs_of_the_data(potential))
    ]


def test_tables_align_numbers_and_write_them_out():
    """Columns of numbers align right, headers included; errors of 13,519 meV are not written as 1.352e+04."""
    text = elements.table(["pair", "depth (eV)"], [["H-O", elements.short(13519.25)], ["H-H", "-"]])
    assert "<th>pair</th>" in text and '<th class="number">depth (eV)</th>' in text
    assert '<td class="number">13519</td>' in text and '<td class="number">-</td>' in text
    assert [elements.short(v) for v in (400, "400", 0.123456, -2586.24, None)] == [
        "400", "400", "0.1235", "-2586", "None",
    ]  # fmt: skip


def test_the_best_and_the_last_validation(tmp_path):
    columns = "step,epoch,score,best,energy_mae,energy_rmse,forces_mae,forces_rmse,virial_mae,virial_rmse\n"
    (tmp_path / "valid.csv").write_text(columns + "2,0,1.5,1,20,30,200,300,,\n4,0,1.8,0,25,35,250,350,,\n")
    (tmp_path / "train.csv").touch()
    words = page(write_report(tmp_path, progress=False)).words["learning-curve"]
    assert "best (step 2)last (step 4)" in words and "forces RMSE (meV/Å)300350" in words
    assert "virial" not in words


def test_missing_parts_name_the_command_that_makes_them(trained, tmp_path):
    run = tmp_path / "run & <more>"
    run.mkdir()
    shutil.copy(trained / "run" / "best.safetensors", run)
    (tmp_path / "empty").mkdir()
    found = page(
        write_report(run, tmp_path / "r.html", evaluation=tmp_path / "empty", pairs=False, progress=False)
    )
    assert found.images == []
    assert 'class="missing"' in (tmp_path / "r.html").read_text()
    assert "no row in train.csv: dpa4 train run.yaml --resume" in found.words["learning-curve"]
    assert (
        "no errors.json: dpa4 eval " in found.words["errors"] and "best.safetensors" in found.words["errors"]
    )
    assert "switched off: dpa4 pairs " in found.words["pair-curves"]
    assert "no run.yaml: dpa4 train run.yaml" in found.words["configuration"]
    assert "run & <more>" in found.words["model"]


def test_a_run_without_a_model(trained, tmp_path):
    for name in ("run.yaml", "train.csv"):
        shutil.copy(trained / "run" / name, tmp_path)
    found = page(write_report(tmp_path, progress=False))
    for name in ("model", "pair-curves"):
        assert "There is no model yet: dpa4 train run.yaml --resume" in found.words[name]
    assert "No evaluation was given; pass its folder with --eval: dpa4 eval" in found.words["errors"]
    assert "no validation data" in found.words["learning-curve"]


def test_pairs_of_the_training_data_only(tmp_path, monkeypatch):
    potential = random_potential()
    potential.coverage = Coverage(4.0, ("H", "O"), {("H", "H"): 1.5, ("H", "O"): 0.9})
    save_potential(potential, tmp_path / "last.safetensors")

    def pairs() -> list[str]:
        words = page(write_report(tmp_path, device="cpu", progress=False)).words["pair-curves"]
        return re.findall(r"^[HCO]+-[HCO]+(?=[\d.]+)", words, re.MULTILINE), words

    assert pairs()[0] == ["H-O", "H-H"]  # closest first
    monkeypatch.setattr(report_training, "MAX_PAIRS", 1)
    found, words = pairs()
    assert found == ["H-O"] and "1 of 2 pairs" in words and "dpa4 pairs" in words
    monkeypatch.setattr(report_training, "MAX_PAIRS", 60)
    potential.coverage = None
    save_potential(potential, tmp_path / "last.safetensors")
    assert len(pairs()[0]) == 6


def test_refusals(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(trained / "run", evaluation=tmp_path / "absent")
    with pytest.raises(
        ValueError, match="is not an output folder of dpa4 train, md, relax or phonon: it has none of best"
    ):
        write_report(tmp_path)
    (tmp_path / "errors.json").write_text('[{"group": 1}]')
    with pytest.raises(ValueError, match="errors.json is damaged"):
        write_report(trained / "run", tmp_path / "r.html", evaluation=tmp_path, progress=False)
    assert not (tmp_path / "r.html").exists()


def test_command(trained, tmp_path):
    arguments = [trained / "run", "--output", tmp_path / "r.html", "--eval", trained / "eval", "--no-pairs"]
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert len(page(tmp_path / "r.html").images) == 2


# --- committees


def test_report_of_a_committee(trained, tmp_path):
    sections = ["summary", "members", "learning-curves", "calibration", "errors", "model", "configuration"]
    sections.append("versions")
    for number, factor in enumerate((1.0, 2.0)):
        member = tmp_path / f"member-{number}"
        shutil.copytree(trained / "run", member)
        rows = read_csv(member / "valid.csv")
        for row in rows:
            row["forces_mae"] = str(factor * float(row["forces_mae"]))
        with (member / "valid.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    rng = np.random.default_rng(0)
    deviations = rng.uniform(0.1, 1.0, 40)
    write_calibration([Calibration("forces", "eV/Å", deviations, 2 * deviations)], tmp_path)
    found = page(write_report(tmp_path, evaluation=trained / "eval"), sections)
    best = [row for row in read_csv(trained / "run" / "valid.csv") if row["best"] == "1"][-1]
    members = found.words["members"]
    for factor in (1.0, 2.0):
        assert elements.short(factor * float(best["forces_mae"])) in members
    assert "largest forces error is 2.0 times the smallest" in members and "energy error is" not in members
    assert (
        model_card(tmp_path / "member-0" / "best.safetensors").sections["Provenance"]["fingerprint"]
        in members
    )
    assert "forceserror 2.00 x deviation, rank correlation 1.00" in found.words["calibration"]
    assert len(found.images) == 3  # learning curves, calibration, parity of the evaluation
    (tmp_path / "member-1" / "best.safetensors").unlink()
    (tmp_path / "calibration.json").unlink()
    words = page(write_report(tmp_path), sections).words
    assert "2, of which 1 have a model" in words["summary"] and "--committee 2 --resume" in words["summary"]
    assert "There is no calibration" in words["calibration"]


# --- simulations


def test_report_of_dynamics(tmp_path):
    run_md(
        bulk("Cu", cubic=True), EMT(), tmp_path / "md", steps=60, ensemble="npt", temperature=150.0, pressure=0.5,
        timestep=2.0, interval=1, progress=False,
    )  # fmt: skip
    sections = ["summary", "course", "statistics", "settings", "versions"]
    found = page(write_report(tmp_path / "md"), sections)
    assert len(found.images) == 1 and found.images[0].startswith(SVG)
    summary = found.words["summary"]
    assert "Cu4, 4 atoms" in summary and "0.12 ps, 60 steps of 2 fs" in summary and "ns/day" in summary
    rows = read_csv(tmp_path / "md" / "thermo.csv")
    mean = sum(float(row["temperature_K"]) for row in rows) / len(rows)
    assert f"{mean:.1f} K" in summary
    assert re.search(rf"temperature \(K\)150{mean:.0f}", found.words["statistics"])
    assert "pressure (GPa)0.5" in found.words["statistics"] and "ensemblenpt" in found.words["settings"]


def test_report_of_a_short_run_lists_what_applies(tmp_path):
    for ensemble, shown, absent in (
        ("nve", ["initial velocities"], ["friction", "thermostat", "barostat", "pressure", "degrees"]),
        ("langevin", ["friction (1/fs)0.01"], ["thermostat", "barostat", "pressure", "degrees"]),
    ):
        folder = tmp_path / ensemble
        run_md(bulk("Cu", cubic=True), EMT(), folder, steps=10, ensemble=ensemble, interval=1, progress=False)
        words = page(write_report(folder), ["summary", "course", "statistics", "settings", "versions"]).words
        assert all(text in words["settings"] for text in [*shown, "time step (fs)0.5"]), words["settings"]
        assert not any(text in words["settings"] for text in absent), words["settings"]
        assert "Running means are drawn from 20 rows of thermo.csv on; there are 11" in words["course"]


def test_report_of_relaxations(tmp_path):
    structures = [bulk("Cu", a=3.6), bulk("Cu", a=3.4, cubic=True)]
    structures[1].rattle(0.1, seed=0)
    relax_all(structures, EMT(), tmp_path / "relax", steps=2, progress=False)
    sections = ["summary", "course", "structures", "settings", "versions"]
    found = page(write_report(tmp_path / "relax"), sections)
    assert found.images[0].startswith(SVG)
    assert (
        "structures2" in found.words["summary"] and "1 structures did not converge" in found.words["summary"]
    )
    assert re.search(r"1Cu4no2.*\n?0Cuyes0", found.words["structures"])  # the unfinished one first
    (tmp_path / "relax" / "steps.csv").unlink()  # as in a folder of an earlier version
    assert page(write_report(tmp_path / "relax"), sections).images[0].startswith(PNG)
    assert CliRunner().invoke(app, ["report", str(tmp_path / "relax")]).exit_code == 0
    with pytest.raises(ValueError, match=r"is a folder of dpa4 relax; give the evaluation with the"):
        write_report(tmp_path / "relax", evaluation=tmp_path)


def test_report_of_phonons(tmp_path):
    pytest.importorskip("phonopy")
    pytest.importorskip("seekpath")
    phonons(
        bulk("Cu"),
        EMT(),
        tmp_path / "phonon",
        supercell=(2, 2, 2),
        relax_first=False,
        mesh=10.0,
        progress=False,
    )
    sections = ["summary", "bands-and-density-of-states", "thermal-properties", "settings", "versions"]
    found = page(write_report(tmp_path / "phonon"), sections)
    assert [image.startswith(SVG) for image in found.images] == [True, True]
    stored = json.loads((tmp_path / "phonon" / "phonon.json").read_text())
    assert f"highest frequency (THz){stored['max_frequency']:.4g}" in found.words["summary"]
    assert "supercell2 × 2 × 2" in found.words["summary"] and "entropy" in found.words["thermal-properties"]


def test_damaged_tables_of_simulations_are_named(tmp_path):
    (tmp_path / "thermo.csv").write_text("step,time_ps\n0,x\n")
    with pytest.raises(ValueError, match=r"thermo.csv is damaged \(could not convert"):
        write_report(tmp_path)
    (tmp_path / "thermo.csv").unlink()
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "relax.csv").write_text("structure,converged\n0,True\n")
    with pytest.raises(ValueError, match=r"relax.csv is damaged \('steps'\)"):
        write_report(tmp_path)
    (tmp_path / "relax.csv").unlink()
    (tmp_path / "phonon.json").write_text("[]")
    with pytest.raises(ValueError, match=r"phonon.json is damaged"):
        write_report(tmp_path)


# --- hostile texts

HOSTILE = (
    "<script>document.title='ran'</script>",
    "\"><img src=x onerror=document.title='ran'>",
    "'><svg onload=document.title='ran'>",
    "</pre></td></title></style><script>document.title='ran'</script>",
    "<a href=javascript:document.title='ran'>",
    "<iframe srcdoc=\"<script>parent.document.title='ran'</script>\">",
    "&lt;script&gt;document.title='ran'",
    "{{constructor.constructor('document.title=1')()}}<!--",
)
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "section", "p", "code", "div",
    "img", "table", "thead", "tbody", "tr", "th", "td", "pre",
}  # fmt: skip
ATTRIBUTES = {"lang", "charset", "http-equiv", "name", "content", "href", "id", "class", "alt", "src"}


class Elements(HTMLParser):
    """Names of all elements and attributes, and values of all references."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.references: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.references |= {value for name, value in attributes if name in ("href", "src")}


@pytest.fixture(scope="module")
def hostile(trained, tmp_path_factory):
    """Report of a run whose folder, labels, options, tables, provenance and versions are hostile."""
    base = tmp_path_factory.mktemp("hostile")
    every = " ".join(HOSTILE)
    folder = base / HOSTILE[0].replace("/", "") / HOSTILE[1].replace("/", "")
    shutil.copytree(trained / "run", folder)
    (folder / "run.yaml").write_text(f"output: {every}\n")
    rows = read_csv(folder / "valid.csv")
    with (folder / "valid.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], f"energy_{HOSTILE[0]}"])
        writer.writeheader()
        for text, row in zip(HOSTILE, rows, strict=False):
            writer.writerow(
                row | {"step": text, "score": text, "energy_mae": text, f"energy_{HOSTILE[0]}": "1"}
            )
    evaluation = base / "eval"
    shutil.copytree(trained / "eval", evaluation)
    table = json.loads((evaluation / "errors.json").read_text())
    for text, row in zip(HOSTILE, table, strict=False):
        row |= {"group": text, "quantity": text, "unit": text, "values": text, "mae": text}
    table.append(
        table[-1] | {"group": "all", "quantity": every, "unit": every, "rmse": every, "maximum": every}
    )
    (evaluation / "errors.json").write_text(json.dumps(table))
    potential = load_potential(folder / "best.safetensors")
    provenance = {text: text for text in HOSTILE} | {"training data": every, "date": every, "preset": every}
    save_potential(potential, folder / "best.safetensors", provenance)
    return write_report(folder, evaluation=evaluation, device="cpu", pairs=False, progress=False)


def test_hostile_texts_stay_texts(hostile):
    text = hostile.read_text(encoding="utf-8")
    found = Elements(text)
    assert found.names <= ELEMENTS and found.attributes <= ATTRIBUTES
    assert all(value.startswith(("#", PNG, SVG)) for value in found.references)
    assert text.count("document.title") > 40 and "default-src 'none'" in text
    policy = text.index("Content-Security-Policy")
    assert policy < text.index("<title>") and policy < text.index("<style>")


@pytest.mark.slow
def test_a_browser_runs_no_script_of_a_report(hostile, tmp_path):
    """In Chromium, also without the policy of the page, which would hide an error of the escaping."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    text = hostile.read_text(encoding="utf-8")
    without = re.sub(r"<meta http-equiv=.*?>\n", "", text)
    assert without != text
    control = "<title>plain</title><script>document.title='ran'</script>"
    titles, elements = {}, {}
    for name, content in (("as it is", text), ("without", without), ("control", control)):
        page = tmp_path / "page.html"
        page.write_text(content, encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True
        )
        dom = done.stdout.decode()
        titles[name] = html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1])
        elements[name] = Elements(dom).names
    assert titles["control"] == "ran"  # the browser runs scripts
    for name in ("as it is", "without"):
        assert titles[name].endswith(": DPA4 training run") and elements[name] <= ELEMENTS


@pytest.mark.slow
def test_figures_are_dark_on_a_dark_screen(trained, tmp_path):
    """In Chromium, whose setting 0 is dark and 1 light."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    from matplotlib.image import imread

    figure = (trained / "eval" / "parity.svg").read_bytes()
    (tmp_path / "page.html").write_text(elements.page("t", "t", {"Figure": elements.image(figure, "t")}))
    brightness = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1100,800", f"--screenshot={shot}",
        ]  # fmt: skip
        subprocess.run(
            [*command, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=120, check=True
        )
        brightness.append(imread(shot)[300:700, 100:1000, :3].mean())
    dark, light = brightness
    assert dark < 0.3 and light > 0.8
