"""The documentation agrees with the code: links, options, defaults, presets, commands, messages."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from dpa4.cli import app
from dpa4.model import DPA4, ModelConfig
from dpa4.model.presets import DEEPMD_PRESETS, PRESETS, preset
from dpa4.model.shapes import count_parameters
from dpa4.training import RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "examples", "benchmarks")
DOCS = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
IDS = [str(path.relative_to(ROOT)) for path in DOCS]
PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands  # type: ignore[attr-defined]
HELP = {"-h", "--help"}
OPTIONS = HELP | {option for parameter in PROGRAM.params for option in parameter.opts}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def table(path: str, heading: str) -> list[list[str]]:
    """Rows below the first table header that starts with the given cells, without backquotes."""
    lines = text(path).splitlines()
    rows = []
    for start in [i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")]:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows, f"{path} has no table {heading!r}"
    return rows


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Default of every option by its dotted name, as written in YAML."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= options(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = (
                "required" if field.is_required() else section.model_dump(mode="json")[name]
            )
    return found


def descriptions(section: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Description of every option by its dotted name."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= descriptions(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_links_resolve(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path}: {link}"
        assert not anchor or anchor in anchors(target), f"{path}: {link}"


def test_every_page_of_the_documentation_is_checked():
    assert {
        "docs/conventions.md",
        "docs/theory.md",
        "docs/data.md",
        "docs/training.md",
        "docs/models.md",
        "docs/running.md",
        "docs/crystals.md",
        "docs/bench.md",
        "docs/properties.md",
        "docs/active-learning.md",
        "docs/checking.md",
        "docs/torchsim.md",
    } <= {*IDS}


def test_options_of_a_run_and_their_defaults():
    expected = options(RunConfig.model_validate({"data": {"train": "train.xyz"}}))
    documented = {
        name: yaml.safe_load(value) for name, value, _ in table("docs/training.md", "option | default")
    }
    documented = {name: float(v) if v == "1e-06" else v for name, v in documented.items()}
    assert documented == expected


def test_meanings_of_options_are_their_descriptions():
    """The tables use the wording that `dpa4 init` writes into a run file."""
    for path, section in (("docs/training.md", RunConfig), ("docs/models.md", ModelConfig)):
        expected = descriptions(section)
        for name, _, meaning in table(path, "option | default"):
            assert meaning == expected[name].removesuffix("."), name


def test_switches_of_the_model_and_their_defaults():
    documented = {
        name: yaml.safe_load(value) for name, value, _ in table("docs/models.md", "option | default")
    }
    assert documented == options(ModelConfig(elements=("H",))) | {"elements": "required"}


def test_presets_and_their_parameter_counts():
    rows = table("docs/models.md", "preset | generation | channels")
    assert [row[0] for row in rows] == list(PRESETS)
    for name, generation, channels, n_focus, n_blocks, mixing_layers, lmax, rank, count in rows:
        config = preset(name)
        assert generation == ("2" if config.message_node_so3 else "1")
        sizes = (config.channels, config.n_focus, config.n_blocks, config.mixing_layers, config.lmax)
        assert tuple(map(int, (channels, n_focus, n_blocks, mixing_layers, lmax))) == sizes
        assert rank == ("none" if config.radial_so2_mode == "none" else str(config.radial_so2_rank))
        assert int(count.replace(",", "")) == sum(p.numel() for p in DPA4(config).parameters())


def test_presets_with_symmetry_o3_and_their_parameter_counts():
    rows = table("docs/models.md", "preset with symmetry O3")
    assert [name for name, _ in rows] == list(PRESETS)
    for name, count in rows:
        assert int(count.replace(",", "")) == count_parameters(preset(name, symmetry="O3")).total


def test_presets_of_deepmd_and_their_parameter_counts():
    heading = "grade | channels | n_focus | n_blocks | mixing_layers | lmax | rank"
    (header,) = [line for line in text("docs/models.md").splitlines() if line.startswith(f"| {heading} |")]
    versions = [cell.strip() for cell in header.split("|")[8:-1]]
    documented = set()
    for grade, channels, n_focus, n_blocks, mixing_layers, lmax, rank, *counts in table(
        "docs/models.md", heading
    ):
        for version, count in zip(versions, counts, strict=True):
            if count == "–":
                continue
            name = f"dpa4-{grade}-{version}"
            documented.add(name)
            config = preset(name)
            sizes = (config.channels, config.n_focus, config.n_blocks, config.mixing_layers, config.lmax)
            assert tuple(map(int, (channels, n_focus, n_blocks, mixing_layers, lmax))) == sizes
            assert rank == ("none" if config.radial_so2_mode == "none" else str(config.radial_so2_rank))
            assert int(count.replace(",", "")) == count_parameters(config).total
    assert documented == set(DEEPMD_PRESETS)


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_commands_exist(path):
    content = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [body for _, body in BLOCK.findall(content)]
    code = [line for body in blocks for line in body.splitlines()] + re.findall(r"`([^`\n]+)`", content)
    for line in [c.strip().removeprefix("$ ") for c in code]:
        if not line.startswith("dpa4 "):
            continue
        command, *arguments = shlex.split(line, comments=True)[1:]
        if command in OPTIONS:
            continue
        assert command in COMMANDS, f"{path}: {line}"
        found = COMMANDS[command]
        if hasattr(found, "commands") and arguments:  # a group, such as bench
            command, *arguments = arguments
            assert command in found.commands, f"{path}: {line}"
            found = found.commands[command]
        known = {option for parameter in found.params for option in parameter.opts} | HELP
        unknown = [a for a in arguments if a.startswith("-") and a.partition("=")[0] not in known]
        assert not unknown, f"{path}: {line}: {unknown}"


def test_options_of_commands_in_tables():
    """Tables of options name existing ones, with their defaults."""
    sections = {
        "finetune": ("docs/finetuning.md", "# Fine-tuning"),
        "md": ("docs/running.md", "## Molecular dynamics"),
        "relax": ("docs/running.md", "## Relaxation"),
        "eos": ("docs/crystals.md", "## Equation of state"),
        "elastic": ("docs/crystals.md", "## Elastic tensor"),
        "phonon": ("docs/crystals.md", "## Phonons"),
        "embed": ("docs/properties.md", "## Embeddings"),
        "select": ("docs/active-learning.md", "## Select structures to label"),
        "pairs": ("docs/properties.md", "## Pair curves"),
        "check": ("docs/checking.md", "## Options"),
        "neb": ("docs/properties.md", "## Barriers"),
        "screen": ("docs/torchsim.md", "## Screening"),
        "lammps": ("docs/lammps.md", "## Without compiling"),
    }
    for command, (page, heading) in sections.items():
        rows = text(page).partition(heading)[2].partition("\n## ")[0]
        found = re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", rows, re.MULTILINE)
        assert found, heading
        parameters = {p.opts[0]: p for p in COMMANDS[command].params}
        for option, default in found:
            parameter = parameters[option]
            expected = parameter.default
            if expected is None and not parameter.required:
                continue  # prose describes the behaviour
            if isinstance(expected, bool):
                expected = "on" if expected else "off"
            shown = "required" if parameter.required else str(expected)
            assert default.removesuffix(".0") == shown.removesuffix(".0"), option


def test_run_files_and_overrides_are_valid(tmp_path):
    """Every YAML block with a model or data section is a run file; every --set names an option."""
    minimal = "data:\n  train: train.xyz\n"
    found = 0
    for path in DOCS:
        content = path.read_text(encoding="utf-8")
        for language, body in BLOCK.findall(content):
            if language == "yaml":
                file = tmp_path / "run.yaml"
                file.write_text(body if "data:" in body else minimal + body)
                load_run_config(file)
                found += 1
        (tmp_path / "minimal.yaml").write_text(minimal)
        for quoted, plain in re.findall(r"--set (?:\"([^\"]+=[^\"]*)\"|(\w[\w.]*=[^\s`]+))", content):
            load_run_config(tmp_path / "minimal.yaml", [quoted or plain])
            found += 1
    assert found > 10


def test_messages_are_those_of_the_code():
    """Each part of a message between the gaps is part of a text in the source."""
    texts: list[str] = []
    for file in (ROOT / "src/dpa4").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for message, _ in table("docs/data.md", "message | what to do"):
        message = message.removesuffix("` (warning)")
        for part in filter(None, (p.strip() for p in message.split("…"))):
            assert any(part in t for t in texts), f"{message!r}: no message with {part!r}"


def test_quoted_messages_of_troubleshooting_are_those_of_the_code():
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "src/dpa4").rglob("*.py"))
    for message, _ in table("docs/troubleshooting.md", "message | cause and remedy"):
        if not message.startswith('"'):  # of PyTorch
            assert all(part.strip() in source for part in message.split("…") if part.strip()), message
    for part in ("compilation failed, so calculations continue in eager mode", "Angstrom apart"):
        assert part in source and part in text("docs/troubleshooting.md").replace("\n", " ")


def test_options_beside_those_of_other_programs_exist():
    """Names of options and commands in the second column of the glossary."""
    known = set(options(RunConfig.model_validate({"data": {"train": "train.xyz"}})))
    known |= {f"model.{name}" for name in ModelConfig.model_fields}
    content, found = text("docs/coming_from.md"), set()
    for line in content.splitlines():
        if line.startswith("| ") and not line.startswith("| |"):
            names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", line.split("|")[2])
            found |= set(names) - {"best.safetensors", "with_dispersion"}
    assert found <= known, found - known
    assert len(found) > 35
    assert {name for name in known if name.startswith("training.")} - found < {
        "training.optimizer", "training.adam_for_basis", "training.weight_decay", "training.final_learning_rate",
        "training.warmup_fraction", "training.warmup_factor", "training.decay_fraction", "training.huber_delta",
        "training.log_interval", "training.tensorboard", "training.device",
    }  # fmt: skip


def test_page_of_benchmarks_is_short_and_the_log_is_newest_first():
    assert len(text("benchmarks/README.md").splitlines()) <= 100
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d):", text("benchmarks/LOG.md"), re.MULTILINE)
    assert dates == sorted(dates, reverse=True) and len(dates) > 5
