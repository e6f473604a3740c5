"""Files beside the code: citation, security, workflow, documentation settings, data of the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import dpa4

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def parsed(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_citation():
    """The required keys of CFF 1.2.0, with the version of the package."""
    citation = parsed("CITATION.cff")
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (str(citation["version"]), citation["license"]) == (dpa4.__version__, "MIT")
    assert citation["authors"] == [{"name": "The dpa4 developers"}]
    assert {i["type"] for i in citation["identifiers"]} <= {"doi", "url", "swh", "other"}
    assert "arXiv:2606.02419" in [i["value"] for i in citation["identifiers"]]
    assert PROJECT["project"]["version"] == dpa4.__version__


def test_workflow_checks_builds_and_runs_slow_tests_at_night():
    workflow = parsed(".github/workflows/ci.yml")
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert {"push", "pull_request", "schedule"} <= set(triggers)
    commands = {
        name: "\n".join(s.get("run", "") for s in job["steps"]) for name, job in workflow["jobs"].items()
    }
    assert ".ci/run" in commands["check"] and "make slow" in commands["slow"]
    assert "python -m build" in commands["wheel"] and "import dpa4" in commands["wheel"]
    assert "schedule" in workflow["jobs"]["slow"]["if"]
    assert "schedule" in workflow["jobs"]["integrations"]["if"]
    assert "tests/docs/test_integrations.py" in commands["integrations"]
    assert (ROOT / ".ci" / "run").is_file()


def test_documentation_is_built_from_an_extra_that_exists():
    settings = parsed(".readthedocs.yaml")
    assert (ROOT / settings["sphinx"]["configuration"]).is_file()
    extras = PROJECT["project"]["optional-dependencies"]
    (install,) = settings["python"]["install"]
    assert set(install["extra_requirements"]) <= set(extras)
    assert set(extras["docs"]) <= set(extras["dev"])


@pytest.mark.parametrize("target", ["make test", "make slow", "make docs", "make env"])
def test_commands_for_contributors_exist(target):
    assert target in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE)


def requirements(lines: list[str]) -> dict[str, str]:
    """Version limit by name of package."""
    pairs = [re.fullmatch(r"([\w-]+) ?(.*)", line).groups() for line in lines]
    return {name: limit for name, limit in pairs}


def test_metadata_of_the_package():
    project = PROJECT["project"]
    assert {"matplotlib", "rich", "typer"} <= set(requirements(project["dependencies"]))
    assert set(parsed("CITATION.cff")["keywords"]) <= set(project["keywords"])
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]
    assert project["urls"]


def test_conda_recipe_has_the_requirements_of_the_package():
    recipe, project = parsed("conda/recipe.yaml"), PROJECT["project"]
    conda = {"torch": "pytorch", "matplotlib": "matplotlib-base", "vesin": "python-vesin"}
    expected = {conda.get(n, n): limit for n, limit in requirements(project["dependencies"]).items()}
    expected["python"] = project["requires-python"]
    assert requirements(recipe["requirements"]["run"]) == expected
    assert recipe["context"]["version"] == project["version"]
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]
    assert "setuptools >=77" in recipe["requirements"]["host"]
    (entry,) = recipe["build"]["python"]["entry_points"]
    assert entry == f"dpa4 = {project['scripts']['dpa4']}"


def test_image_copies_what_the_build_needs():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [file for line in lines if line.startswith("COPY ") for file in line.split()[1:-1]]
    assert all((ROOT / file).exists() for file in copied)
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "src"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{file}" for file in copied} <= set(ignored) and ignored[0] == "*"
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', "\n".join(lines), re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_security_names_the_safe_readers():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for words in ("weights_only=True", "allow_pickle=False", "safetensors", "Report a"):
        assert words in text


def test_every_data_file_is_in_the_wheel():
    """Files without the suffix .py match a pattern of package-data, and every pattern matches a file."""
    package = ROOT / "src" / "dpa4"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["dpa4"]
    packed = {pattern: set(package.glob(pattern)) for pattern in patterns}
    files = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert files == set().union(*packed.values())
    assert all(packed.values()), f"patterns without files: {[p for p, found in packed.items() if not found]}"
    assert package / "py.typed" in files
