"""Run files: defaults, overrides, and faults that name the option, its value and the allowed values."""

from pathlib import Path

import pytest
import yaml

from dpa4.model.presets import preset
from dpa4.training.options import RunConfig, TrainingOptions
from dpa4.training.run_file import default_config_text, load_run_config


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: train.xyz}\n")
    return path


def test_the_starting_file_is_the_default_with_a_smooth_cutoff(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(default_config_text("some/train.xyz"))
    config = load_run_config(path)
    default = {"model": {"edge_norm": False}, "data": {"train": "some/train.xyz"}}
    assert config == RunConfig.model_validate(default)
    assert config.data.train == (Path("some/train.xyz"),)


def test_the_starting_file_of_a_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(default_config_text(name="dpa4-neo-v20260911"))
    model = load_run_config(path).model
    assert model.build(["H"]) == preset("dpa4-neo-v20260911", ("H",), symmetry="O3")
    with pytest.raises(ValueError, match="unknown preset 'neon'"):
        default_config_text(name="neon")


def test_the_starting_file_names_and_explains_every_option():
    lines = default_config_text().splitlines()
    for name, field in TrainingOptions.model_fields.items():
        at = end = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}:"))
        while lines[at - 1].startswith("  # "):
            at -= 1
        assert " ".join(line.removeprefix("  # ") for line in lines[at:end]) == field.description
    options = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    comments = [line for line in lines if line.lstrip().startswith("#")]
    assert len(comments) > len(options)


def test_overrides_are_yaml_and_beat_the_file(run_file):
    run_file.write_text("data: {train: [a.xyz, b.xyz]}\ntraining: {learning_rate: 1e-3, seed: 3}\n")
    overrides = [
        "training.learning_rate=5e-4",
        "training.steps=1e3",
        "model.lmax=2",
        "model.elements=[H, No]",
    ]
    config = load_run_config(run_file, overrides)
    assert (config.training.learning_rate, config.training.steps, config.training.seed) == (5e-4, 1000, 3)
    assert config.data.train == (Path("a.xyz"), Path("b.xyz"))
    model = config.model.build([])
    assert (model.lmax, model.channels, model.elements) == (2, 32, ("H", "No"))


def test_elements_are_filled_in_from_the_data(run_file):
    assert load_run_config(run_file).model.build(["H", "O"]).elements == ("H", "O")


def test_numbers_of_yaml_1_1_that_would_be_strings(run_file):
    run_file.write_text("data: {train: t, reference_energies: {H: 1e-3, N: -.5e+1, 'O': 2E2}}\n")
    assert load_run_config(run_file).data.reference_energies == {"H": 1e-3, "N": -5.0, "O": 200.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", r"unknown option training\.lerning_rate; did you mean 'learning_rate'\?"),
        ("trainning.steps=1", r"unknown option trainning; did you mean 'training'\?"),
        ("data.keys.enrgy=E", r"unknown option data\.keys\.enrgy; did you mean 'energy'\?"),
        ("model.lmxa=2", r"unknown option model\.lmxa; did you mean 'lmax'\?"),
        ("steps=200", r"unknown option steps; did you mean 'training\.steps'\?"),
        ("train=b.xyz", r"unknown option train; did you mean 'data\.train'\?"),
        ("model.steps=2", r"unknown option model\.steps; did you mean 'training\.steps'\?"),
        ("training.cutof=5", r"unknown option training\.cutof; did you mean 'model\.cutoff'\?"),
        ("training.elements=[H]", r"unknown option training\.elements; did you mean 'model\.elements'\?"),
        ("model.bridging={kind: pairs}", r"model\.bridging: unknown entry 'kind'\. ZBL bridging"),
        ("model.sandwich_norm=[true]", r"model\.sandwich_norm: an entry is missing\. Norms before"),
        ("data.zzzz=1", r"unknown option data\.zzzz; allowed are train, validation"),
        ("model.preset=minni", r"unknown preset 'minni'; did you mean 'mini'\?"),
        ("model.lmax=-1", r"model\.lmax = -1: input should be greater than or equal to 0"),
        ("model.elements=[H, Xq]", r"model\.elements has \['Xq'\]; allowed are chemical symbols"),
        ("training.loss=l1", r"training\.loss = 'l1': input should be 'mae', 'mse' or 'huber'"),
        ("training.compile=maybe", r"training\.compile = 'maybe': input should be a valid boolean"),
        ("model.channels=100000", r"model\.channels.* = 100000: input should be less than or equal to 1024"),
        ("model.cutoff=4500", r"model\.cutoff.* = 4500: input should be less than or equal to 30"),
        ("training.steps=1" + 20 * "0", r"training\.steps = 1.*: input should be less than or equal to"),
        ("training.seed=-1", r"training\.seed = -1: input should be greater than or equal to 0"),
        ("training.batch_size=0", r"training\.batch_size = 0: input should be greater than 0"),
        ("training.max_atoms=x", r"training\.max_atoms = 'x': input should be a valid integer \(override"),
        ("training.ema_decay=2", r"training\.ema_decay = 2: input should be less than 1"),
        ("training.learning_rate=.nan", r"training\.learning_rate = nan: input should be a finite number"),
        (
            "training.virial_weight=a",
            r"training\.virial_weight = 'a': input should be a valid number or 'auto'",
        ),
        ("training.virial_weight=-1", r"training\.virial_weight must be >= 0 or auto, got -1"),
        (
            "training.final_learning_rate=1",
            r"final_learning_rate = 1\.0 must be at most 0\.001, unless training\.learning_rate is a number",
        ),
        (
            "training={schedule: exp, final_learning_rate: 0}",
            r"training\.schedule = exp needs training\.final_learning_rate above 0",
        ),
        ("data.train=[]", r"data\.train = \[\]: list should have at least 1 item"),
        ("data.train=null", r"data\.train = None: input should be a list"),
        ("device=gpu", r"device = 'gpu': allowed are auto, cpu, cuda and"),
        ("training=3", r"training = 3: input should be a map of options"),
    ],
)
def test_faults_name_option_value_and_what_is_allowed(run_file, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_run_config(run_file, [override])
    assert "Value error" not in str(caught.value)  # words of pydantic


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.epochs=2", "training.steps=3"],
            r"training\.epochs = 2 or training\.steps = 3; set one to null",
        ),
        (
            ["training.optimizer=adamw", "training.adam_for_basis=true"],
            r"training\.adam_for_basis = true is an option of hybrid_muon, .*training\.optimizer = adamw",
        ),
        (
            ["training.batch_size=2", "training.max_atoms=3"],
            r"training\.batch_size = 2 cannot be combined with .*max_atoms",
        ),
        (
            ["training.energy_weight=0", "training.forces_weight=0", "training.virial_weight=0"],
            r"are all 0: nothing to learn",
        ),
    ],
)
def test_contradictions(run_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(run_file, overrides)


def test_all_faults_are_reported_at_once(run_file):
    with pytest.raises(ValueError, match=r"(?s)training\.loss.*unknown option outptu; did you mean 'output'"):
        load_run_config(run_file, ["training.loss=a", "outptu=b"])


def test_missing_data_section(run_file):
    run_file.write_text("output: here\n")
    with pytest.raises(ValueError, match="option data is required: Structures with energies"):
        load_run_config(run_file)


def test_files_that_are_no_run_file(run_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml does not exist; `dpa4 init` writes"):
        load_run_config(tmp_path / "nothing.yaml")
    run_file.write_text("[a, b]")
    with pytest.raises(ValueError, match="must be a map of options .* got list"):
        load_run_config(run_file)
    run_file.write_text("a: [b")
    with pytest.raises(ValueError, match="run.yaml is not valid YAML"):
        load_run_config(run_file)


@pytest.mark.parametrize("override", ["training.steps", "=3"])
def test_malformed_override(run_file, override):
    with pytest.raises(ValueError, match="must look like training.learning_rate=5e-4"):
        load_run_config(run_file, [override])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["training.steps=many", "output=x"], "valid integer (override 'training.steps=many')"),
        (["training.lerning_rate=1"], "'learning_rate'? (override 'training.lerning_rate=1')"),
        (["training.epochs=2", "training.steps=9"], "(override 'training.epochs=2', 'training.steps=9')"),
        (["model.channels=-1"], "(override 'model.channels=-1')"),
        (["data.keys=energy"], "(override 'data.keys=energy')"),
    ],
)
def test_faults_of_overrides_name_the_override(run_file, overrides, named):
    with pytest.raises(ValueError) as caught:
        load_run_config(run_file, overrides)
    assert named in str(caught.value)


def test_faults_of_the_file_name_no_override(run_file):
    run_file.write_text(run_file.read_text() + "device: tpu\n")
    with pytest.raises(ValueError) as caught:
        load_run_config(run_file, ["training.steps=many"])
    lines = str(caught.value).splitlines()
    assert [("override" in line, "tpu" in line) for line in lines[1:]] == [(True, False), (False, True)]


def test_override_that_is_not_yaml(run_file):
    with pytest.raises(ValueError, match=r"override 'training.seed=\[' is not valid YAML"):
        load_run_config(run_file, ["training.seed=["])


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("trial #2", "trial #2"),
        ("2026-11-30", "2026-11-30"),
        ("0123", "0123"),
        ("1e3", "1e3"),
        ("yes", "yes"),
        ("null", "null"),
        ("a: b", "a: b"),
        ("[x]", "[x]"),
        ("a~/run", "a~/run"),
        (" run ", "run"),
        ("'two words # no comment'", "two words # no comment"),
    ],
)
def test_texts_of_overrides_are_used_as_they_are_typed(run_file, typed, name):
    assert load_run_config(run_file, [f"output={typed}"]).output == Path(name)
    if name not in ("null", "[x]"):  # no file, and a list of one file
        assert load_run_config(run_file, [f"data.train={typed}"]).data.train == (Path(name),)
        assert load_run_config(run_file, [f"data.keys.energy={typed}"]).data.keys.energy == name


def test_the_home_folder_in_overrides(run_file):
    config = load_run_config(run_file, ["output=~/run", "data.train=[~/a.xyz, b.xyz]", "data.validation=~"])
    assert config.output == Path.home() / "run"
    assert config.data.train == (Path.home() / "a.xyz", Path("b.xyz"))


def test_lists_of_texts_and_absent_texts_in_overrides(run_file):
    data = load_run_config(run_file, ["data.train=[a b.xyz, 0123, x #2.xyz]", "data.validation=null"]).data
    assert data.train == (Path("a b.xyz"), Path("0123"), Path("x #2.xyz")) and data.validation == ()
    data = load_run_config(run_file, ["data.train=['a, b.xyz', c]", "data.keys.energy=null"]).data
    assert data.train == (Path("a, b.xyz"), Path("c")) and data.keys.energy is None
    data = load_run_config(run_file, ["data.reference_energies={H: -13.6}"]).data
    assert data.reference_energies == {"H": -13.6}
    with pytest.raises(ValueError, match="output = None: input is not a valid path"):
        load_run_config(run_file, ["output="])


def test_the_configuration_round_trips_through_plain_values(run_file):
    config = load_run_config(run_file, ["model.lmax=2", "training.virial_weight=3"])
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert RunConfig.model_validate(yaml.safe_load(text)) == config


def test_own_models_have_mirror_symmetry_unless_an_option_says_otherwise(run_file):
    assert load_run_config(run_file).model.build(["H"]).symmetry == "O3"
    assert load_run_config(run_file, ["model.symmetry=SO3"]).model.build(["H"]).symmetry == "SO3"
    with pytest.raises(ValueError, match="model.symmetry = 'SU2': input should be 'SO3' or 'O3'"):
        load_run_config(run_file, ["model.symmetry=SU2"])
