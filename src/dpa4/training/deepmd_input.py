"""Translation of a training input of deepmd-kit into a run file.

The model section is translated by the importer of checkpoints (`dpa4.potential.deepmd`). Everything that is different
here, or has no counterpart, is listed; nothing is dropped silently. Keys that begin with an underscore are comments.
"""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from dpa4.model import ModelConfig
from dpa4.model.presets import closest_preset, preset
from dpa4.output import atomic_write, check_writable
from dpa4.parsing import printable, read_json, read_yaml, shown
from dpa4.potential.deepmd.inputs import InputModel, read_model_section
from dpa4.potential.deepmd.option_types import check_plain
from dpa4.system import user_path
from dpa4.training import deepmd_recipe as recipe
from dpa4.training.deepmd_recipe import Difference, Options, Report, Section
from dpa4.training.run_file import checked_run_config

INPUT_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class TranslatedInput:
    """Run file made of an input, and the entries of the input that are different there or absent."""

    options: dict[str, Options]  # by section: model, data, training
    differences: tuple[Difference, ...]
    unused: tuple[str, ...]

    def text(self, source: str) -> str:
        """Run file, whose head names the source and lists the differences."""
        lines = [f"# Translated by dpa4 from the deepmd-kit input {printable(source)}."]
        if self.differences:
            lines.append("# Different from deepmd-kit, or not translated:")
        for option, value, remark in self.differences:
            comment = f"{option} = {value}: {remark}"
            lines += textwrap.wrap(comment, 108, initial_indent="# * ", subsequent_indent="#   ")
        for section, options in self.options.items():
            lines += ["", f"{section}:", *(_yaml(key, value) for key, value in options.items())]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> Table:
        """The differences as a table for the terminal."""
        table = Table(title="different from deepmd-kit, or not translated", title_justify="left")
        for column in ("option", "value", "remark"):
            table.add_column(column, overflow="fold")
        for difference in self.differences:
            table.add_row(*map(Text, difference))
        return table


def convert_input(source: Path | str, target: Path | str) -> TranslatedInput:
    """Write the run file that corresponds to a training input of deepmd-kit.

    Args:
        source: Input file, ``.json`` or ``.yaml``.
        target: Run file to write.

    Raises:
        FileNotFoundError: If there is no input file, or the folder of ``target`` does not exist.
        ValueError: If the file is not an input of deepmd-kit, or its model is not supported.
    """
    source, target = user_path(source), user_path(target)
    check_writable(target)
    translated = translate_input(source)
    with atomic_write(target) as temporary:
        temporary.write_text(translated.text(source.name), encoding="utf-8")
    return translated


def translate_input(source: Path) -> TranslatedInput:
    """Translate a training input of deepmd-kit; arguments and errors as in `convert_input`."""
    if not source.is_file():
        raise FileNotFoundError(f"there is no input {source}")
    values = read_json(source) if source.suffix == INPUT_SUFFIXES[0] else read_yaml(source)
    try:
        check_plain(values)
        translated = _translate(_without_comments(values), source.parent)
        checked_run_config(translated.options, "the run file")
    except ValueError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()).replace(":;", ":")
        raise ValueError(f"cannot translate {source}: {reason}") from None
    return translated


def _translate(values: Any, folder: Path) -> TranslatedInput:
    if not isinstance(values, Mapping) or not {"model", "training"} <= values.keys():
        raise ValueError(
            "it is not a training input of deepmd-kit, which has the sections model and training"
        )
    report = Report()
    whole = Section(values, "", report)
    section = whole.take("model")
    if not isinstance(section, Mapping):
        raise ValueError(f"model = {shown(section)} must be a map of options")
    model = read_model_section(section)
    training, rate, optimizer, loss, validating = (
        Section(whole.take(name, {}), name, report)
        for name in ("training", "learning_rate", "optimizer", "loss", "validating")
    )
    data, batches = _data(training, folder, report)
    length = recipe.length(training)
    options = (
        length
        | batches
        | recipe.optimizer(optimizer, _is_of_september(model.config))
        | recipe.schedule(rate, length.get("steps"))
        | recipe.loss(loss)
        | _loop(training)
        | _network_in_training(model, report)
    )
    _validation(validating)
    whole.unused(("$schema",))
    whole.close()
    sections = {
        "model": _model(model),
        "data": data | _reference_energies(model, report),
        "training": options,
    }
    return TranslatedInput(sections, tuple(report.differences), tuple(report.unused))


def _is_of_september(config: ModelConfig) -> bool:
    """Return whether only versions of deepmd-kit from 11 September 2026 on have the radial basis of a model."""
    return config.env_exp.basis is None or config.basis.endswith("/fix")


def _model(model: InputModel) -> Options:
    """Section model of the run file: the preset closest to the configuration, and what differs from it."""
    config = model.config
    name = closest_preset(config).name if model.preset is None else model.preset.lower()
    values, published = config.model_dump(mode="json"), preset(name, config.elements).model_dump(mode="json")
    always = ("elements", "bridging", "symmetry")  # their defaults are other ones in a run file
    changed = {key: value for key, value in values.items() if value != published[key] and key not in always}
    return {"preset": name} | {key: values[key] for key in always} | changed


def _network_in_training(model: InputModel, report: Report) -> Options:
    """Options of the model section that influence the training only."""
    given = dict(model.irrelevant)
    mixed = given.pop("descriptor.use_amp", None)
    options: Options = {"precision": "high" if mixed is False else "fast"}
    if mixed is not False:
        value = "True (default)" if mixed is None else shown(mixed)
        remark = "bfloat16 on GPUs in deepmd-kit; set training.precision to high for training on a CPU"
        report.differences.append(Difference("model.descriptor.use_amp", value, remark))
    if (compiled := given.pop("use_compile", None)) is not None:
        options["compile"] = compiled
    if model.bits == 64:
        remark = "models are trained in float32 here"
        report.differences.append(Difference("model.descriptor.precision", "'float64'", remark))
    for key, (usual, remark) in _ONLY_IN_TRAINING.items():
        if key in given and (value := given.pop(key)) != usual and value is not None:
            report.differences.append(Difference(f"model.{key}", shown(value), remark))
    given.pop("preset_out_bias", None)  # see _reference_energies
    report.unused += [f"model.{key} = {shown(value)}" for key, value in given.items()]
    return options


_ONLY_IN_TRAINING: dict[str, tuple[Any, str]] = {
    "lora": (None, "set training.finetune.lora_rank and lora_alpha beside model.start_from"),
    "descriptor.trainable": (True, "all weights are trained here"),
    "fitting_net.trainable": (True, "all weights are trained here"),
}


def _reference_energies(model: InputModel, report: Report) -> Options:
    """Option reference_energies, if the input gives the energies of all elements."""
    own = "the network's energy of a free atom is not subtracted here"
    if model.atom_energies is not None:
        remark = f"{own}; set data.reference_energies to the energies of free atoms"
        report.differences.append(
            Difference("model.fitting_net.atom_ener", shown(model.atom_energies), remark)
        )
    if model.vacuum_reference:
        report.differences.append(Difference("model.fitting_net.vacuum_ref", "True", own))
    elif model.vacuum_reference is not None:
        report.unused.append(
            "model.fitting_net.vacuum_ref = True"
        )  # deepmd-kit switches it off without a bias
    fixed = model.irrelevant.get("preset_out_bias")
    energies = fixed.get("energy") if isinstance(fixed, Mapping) else None
    elements = model.config.elements
    if isinstance(energies, list) and len(energies) == len(elements) and all(map(_is_number, energies)):
        return {"reference_energies": dict(zip(elements, map(float, energies), strict=True))}
    if fixed is not None:
        remark = "set data.reference_energies to the energies of all elements; without, they are fitted"
        report.differences.append(Difference("model.preset_out_bias", shown(fixed), remark))
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _data(training: Section, folder: Path, report: Report) -> tuple[Options, Options]:
    """Options of the data, and of the batches."""
    train = Section(training.take("training_data", {}), "training.training_data", report)
    data: Options = {"train": _systems(train, folder)}
    batches = recipe.batches(train)
    every = "every structure is seen once per epoch here"
    train.expect(every, auto_prob="prob_sys_size", sys_probs=None)
    train.expect("all systems below a folder are read here", rglob_patterns=None)
    train.expect("structures with closer atoms are not left out here; remove them", min_pair_dist=0)
    train.unused(("set_prefix", "numb_btch", "numb_batch"))
    train.close()
    if (held_out := training.take("validation_data")) is None:
        return data | {"validation_fraction": 0.0}, batches
    validation = Section(held_out, "training.validation_data", report)
    data["validation"] = _systems(validation, folder)
    validation.expect("all systems below a folder are read here", rglob_patterns=None)
    validation.unused(("batch_size", "numb_btch", "numb_batch", "auto_prob", "sys_probs", "set_prefix"))
    validation.close()
    return data, batches


def _systems(section: Section, folder: Path) -> list[str]:
    """Paths of the systems, which are relative to the folder of the input.

    Raises:
        ValueError: If they are not texts.
    """
    systems = section.take("systems")
    names = [systems] if isinstance(systems, str) else systems
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(section.message("systems", systems, "must be a folder or a list of folders"))
    paths = [str(folder / name) for name in names]
    problems = [_problem(path) for path in paths]
    for problem in dict.fromkeys(filter(None, problems)):
        affected = [path for path, other in zip(paths, problems, strict=True) if other == problem]
        section.differs("systems", affected, problem)
    return paths


def _problem(path: str) -> str | None:
    """Reason why a system cannot be read; None if there is a file or folder of another kind."""
    for mark, kind in ((".lmdb", "LMDB"), (".hdf5", "HDF5"), (".h5", "HDF5")):
        if path.partition("#")[0].endswith(mark):
            return f"{kind} data of deepmd-kit are not read here; write them as folders (npy) or extended XYZ"
    # Unlike the function of pathlib, this one is false for a name that no file can have.
    return None if os.path.exists(user_path(path)) else "does not exist; correct the path in the run file"


def _loop(training: Section) -> Options:
    """Options of the section training that are not about data, length or batches."""
    averaged, decay = training.take("enable_ema", False), training.number("ema_decay", 0.999)
    options: Options = {
        "gradient_clip": float(training.number("gradient_max_norm", 0.0)) or None,
        "ema_decay": float(decay) if averaged else None,
    }
    for ours, theirs in _SAME_IN_TRAINING.items():
        if (value := training.take(theirs)) is not None:
            options[ours] = value
    training.expect("the reference energies are those of the start", change_bias_after_training=False)
    training.expect("the run is not a mixture of tasks here", model_prob=None, data_dict=None)
    training.unused(_OF_THE_PROGRAM)
    training.close()
    return options


_SAME_IN_TRAINING = {
    "seed": "seed",
    "log_interval": "disp_freq",
    "checkpoint_interval": "save_freq",
    "tensorboard": "tensorboard",
}
_OF_THE_PROGRAM = (
    "disp_file disp_training disp_avg time_training timing_in_training profiling profiling_file enable_profiler "
    "tensorboard_log_dir tensorboard_freq save_ckpt save_dir max_ckpt_keep ema_ckpt_keep ckpt_keep_ratio stat_file "
    "stat_file_mode zero_stage numb_test acc_freq"
).split()
"""Files, tables, statistics and processes of deepmd-kit."""


def _validation(validating: Section) -> None:
    validating.expect("always full here, every training.validation_interval steps", full_validation=False)
    validating.unused(
        (
            "validation_freq",
            "save_best",
            "max_best_ckpt",
            "validation_metric",
            "full_val_file",
            "full_val_start",
        )
    )
    validating.close()


def _without_comments(value: Any) -> Any:
    """Copy of nested maps without the keys that begin with an underscore."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_comments(entry) for key, entry in value.items() if not key.startswith("_")}


def _yaml(key: str, value: Any) -> str:
    """Entry of a section in YAML; lists and maps are in brackets."""
    in_brackets = None if isinstance(value, list | dict) else False
    entry = yaml.safe_dump(
        {key: value}, default_flow_style=in_brackets, width=100, sort_keys=False, allow_unicode=True
    )
    return textwrap.indent(entry.rstrip(), "  ")
