"""Published files: found or named with their source; the page of the documentation agrees with the code."""

import gzip
import re
from pathlib import Path

import pytest
import typer

from bench_cases import command, saved_model
from dpa4.cli import app
from dpa4.data import unpacking
from dpa4.leaderboards import files
from dpa4.leaderboards.discovery import read_entries, read_summary
from dpa4.leaderboards.metrics import combined_performance_score
from dpa4.leaderboards.submission import read_metadata

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "file"),
    [("discovery", files.WBM_INITIAL), ("kappa", files.KAPPA_STRUCTURES), ("spice", files.SPICE_TEST)],
)
def test_a_missing_file_is_named_with_its_source_and_place(tmp_path, task, file):
    output = command(task, saved_model(tmp_path), "--data", tmp_path, ok=False)
    for part in (Path(file.path).name, file.content, file.source, str(tmp_path / file.path)):
        assert part in output


def test_files_are_found_flat_or_in_their_subfolder(tmp_path):
    (tmp_path / Path(files.KAPPA_REFERENCE.path).name).touch()
    assert files.locate(tmp_path, files.KAPPA_REFERENCE).parent == tmp_path
    (tmp_path / "phonons").mkdir()
    (tmp_path / files.KAPPA_REFERENCE.path).touch()
    assert files.locate(tmp_path, files.KAPPA_REFERENCE).parent == tmp_path / "phonons"


def test_tables_of_options_agree_with_the_commands():
    group = typer.main.get_command(app).commands["bench"]
    headings = {
        "discovery": "Discovery",
        "kappa": "Conductivity",
        "diatomics": "Diatomic",
        "spice": "SPICE-MACE",
    }
    for name, heading in headings.items():
        section = PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]
        found = re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", section, re.MULTILINE)
        assert found, heading
        parameters = {parameter.opts[0]: parameter for parameter in group.commands[name].params}
        for option, default in found:
            expected = parameters[option].default
            assert default == ("off" if expected is False else str(expected)), (name, option)


def test_table_of_files_agrees_with_the_code():
    known = [value for value in vars(files).values() if isinstance(value, files.PublishedFile)]
    documented = dict(re.findall(r"^\| `([\w./-]+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert set(documented) == {file.path for file in known}
    for file in known:
        if "github" not in file.source:
            assert file.source.removeprefix("https://") == documented[file.path].strip()


def test_metadata_of_the_documentation_is_complete(tmp_path):
    (example,) = re.findall(r"^```\n(model_name:.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "metadata.yaml").write_text(example)
    assert read_metadata(tmp_path / "metadata.yaml")["model_key"] == "my-dpa4"


def test_published_scores_of_the_documentation_fit_together():
    table = re.findall(r"^\| [^|]+ \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|", PAGE, re.MULTILINE)
    assert len(table) == 9
    for row in table:
        score, *metrics = map(float, row)
        # half a unit of the last digit in each: 0.0005 (0.5 + 0.2 + 0.67) + 0.0005
        assert combined_performance_score(*metrics) == pytest.approx(score, abs=0.0012)


def test_published_files_are_limited_while_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 2**16)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**22 + b"]"))
    for read in (files.read_json, read_summary, lambda p: list(read_entries(p))):
        with pytest.raises(
            ValueError, match=r"bomb.json.gz cannot be read: it unpacks to more than [\d,]+ bytes"
        ):
            read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"nothing", "BadGzipFile"),
        (gzip.compress(b'{"a": 1}')[:-9], "EOFError"),
        (gzip.compress(b"{"), "JSONDecodeError"),
        (gzip.compress(b"[" * 10**5), "RecursionError"),
        (gzip.compress(b"\xff\xfe\xfd"), "UnicodeDecodeError"),
    ],
    ids=["no gzip", "cut", "JSON cut", "deep JSON", "no text"],  # a compressed file holds the time
)
def test_damaged_published_files_are_named(tmp_path, content, reason):
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    for read in (files.read_json, lambda p: list(read_entries(p))):
        with pytest.raises(ValueError, match=f"^{path} cannot be read: {reason}: "):
            read(path)
