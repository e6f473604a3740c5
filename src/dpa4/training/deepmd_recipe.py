"""Recipe of a training input of deepmd-kit (loss, optimiser, schedule, length, batches) as options of a run.

Each function translates one section and reports through `Section` every key that has no counterpart. Defaults of
absent keys are those of deepmd-kit 3.2.0.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpa4.parsing import printable, shown

Options = dict[str, Any]


class Difference(NamedTuple):
    """Entry of an input whose translation is not exact, or that was not translated."""

    option: str  # path of the key
    value: str
    remark: str


@dataclass
class Report:
    """Entries of an input that are not in the run file, or are different there."""

    differences: list[Difference] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Entries such as "training.zero_stage = 1", which have no influence on the trained model."""


class Section:
    """Section of an input, which reports the keys that nothing has read.

    Args:
        values: The section.
        path: Name of the section in messages, such as "training"; empty for the whole input.
        report: Report to add to.

    Raises:
        ValueError: If the section is not a map.
    """

    def __init__(self, values: object, path: str, report: Report):
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} = {shown(values)} must be a map of options")
        self._values, self._prefix, self._report = dict(values), path + "." if path else "", report

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, which then counts as read."""
        return self._values.pop(key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return the value of a key, a finite number, or the default if the key is absent or null.

        Raises:
            ValueError: If the value is not a number.
        """
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(self.message(key, value, "must be a number"))
        return value

    def message(self, key: str, value: object, problem: str) -> str:
        """Message about a value that is not allowed."""
        return f"{self._prefix}{key} = {shown(value)} {problem}"

    def differs(self, key: str, value: object, remark: str) -> None:
        """Report a value that has no exact counterpart."""
        self._report.differences.append(Difference(self._prefix + printable(key), shown(value), remark))

    def expect(self, remark: str, **usual: Any) -> None:
        """Read keys of which only one value has a counterpart; report any other value, with a remark."""
        for key, value in usual.items():
            found = self.take(key, value)
            if found != value and not (found is None and not value):
                self.differs(key, found, remark)

    def unused(self, keys: Iterable[str]) -> None:
        """Read keys that have no influence on the trained model."""
        for key in keys:
            if key in self:
                self._report.unused.append(f"{self._prefix}{key} = {shown(self.take(key))}")

    def close(self) -> None:
        """Report all keys that nothing has read."""
        for key, value in self._values.items():
            self.differs(key, value, "unknown to dpa4, not translated; see the options in docs/training.md")
        self._values.clear()


def loss(section: Section) -> Options:
    """Options of the loss.

    Raises:
        ValueError: If the loss is not that of an energy model.
    """
    if (kind := section.take("type", "ener")) not in ("ener", "dpa4", "sezm", "SeZM", "DPA4"):
        raise ValueError(
            f"loss.type = {shown(kind)} is not supported; supported: 'ener', energies and forces"
        )
    options: Options = {"loss": _error_measure(section)}
    for ours, letter, start, limit in (
        ("energy_weight", "e", 0.02, 1),
        ("forces_weight", "f", 1000, 1),
        ("virial_weight", "v", 0, 0),
    ):
        first = section.number(f"start_pref_{letter}", start)
        last = section.number(f"limit_pref_{letter}", limit)
        options[ours] = float(last) if first and last else 0.0
        if options[ours] and first != last:
            section.differs(
                f"start_pref_{letter}",
                first,
                f"weights are constant here, training.{ours} is limit_pref_{letter} = {last:g} from the start",
            )
    if options["loss"] == "huber":
        options["huber_delta"] = _huber_delta(section)
    section.unused(("huber_delta",))
    unknown = "there is no such term of the loss here"
    section.expect(unknown, **{f"{end}_pref_{x}": 0.0 for end in ("start", "limit") for x in _OTHER_TERMS})
    section.expect(unknown, relative_f=None, enable_atom_ener_coeff=False, numb_generalized_coord=0)
    section.expect("weights per atom are not supported", use_default_pf=False)
    section.close()
    return options


_OTHER_TERMS = ("ae", "pf", "gf", "h")  # energies per atom, weighted and generalised forces, Hessian


def _error_measure(section: Section) -> str:
    measure, huber = section.take("loss_func", "mse"), bool(section.take("use_huber", False))
    norm, intensive = section.take("f_use_norm", False), section.take("intensive_ener_virial", False)
    if measure not in ("mae", "mse"):
        section.differs(
            "loss_func", measure, "mae is used instead; change training.loss to mae, mse or huber"
        )
        measure = "mae"
    if huber and measure == "mae":
        section.differs("use_huber", True, "has no effect with loss_func = mae, in deepmd-kit either")
    measure = "huber" if huber and measure == "mse" else measure
    if not norm and measure != "mse":
        section.differs(
            "f_use_norm",
            norm,
            "forces are compared by the length of the error vector here, about twice the mean error of a component; "
            "halve training.forces_weight for the same balance",
        )
    if not intensive and measure == "mse":
        section.differs(
            "intensive_ener_virial",
            intensive,
            "errors per atom are squared here, as with true, so large structures count less",
        )
    return measure


def _huber_delta(section: Section) -> float:
    delta = section.take("huber_delta", 0.01)
    deltas = delta if isinstance(delta, list) else [delta]
    if not deltas or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in deltas
    ):
        raise ValueError(f"loss.huber_delta = {shown(delta)} must be a number or three of them")
    if len(set(deltas)) > 1:
        section.differs("huber_delta", delta, "one value for all terms here, the first is used")
    return float(deltas[0])


def optimizer(section: Section, adam_for_basis: bool) -> Options:
    """Options of the optimiser.

    Args:
        section: The section optimizer of the input, or an empty one.
        adam_for_basis: The version of deepmd-kit that reads the model moves the two matrices that multiply the radial
            basis from Muon to Adam.
    """
    kind = section.take("type", "Adam")
    name = str(kind).lower()
    options: Options = {"optimizer": "hybrid_muon" if name == "hybridmuon" else "adamw"}
    if name == "hybridmuon":
        options["weight_decay"] = float(section.number("weight_decay", 1e-3))
        for key, value in _FIXED_OF_MUON.items():
            section.expect(f"always {value} here", **{key: value})
        section.unused(("flash_muon",))
        options |= {"adam_for_basis": True} if adam_for_basis else {}
        beta2 = 0.95
    elif name in ("adam", "adamw"):
        options["weight_decay"] = float(section.number("weight_decay", 1e-3 if name == "adamw" else 0.0))
        beta2 = 0.999
    else:
        section.differs("type", kind, "hybrid_muon is used instead; change training.optimizer")
        section.close()
        return {"optimizer": "hybrid_muon"}
    section.expect("always 0.9 here", adam_beta1=0.9)
    if (found := section.number("adam_beta2", beta2)) != 0.95:
        section.differs("adam_beta2", found, "always 0.95 here")
    section.close()
    return options


_FIXED_OF_MUON = {
    "momentum": 0.95,
    "lr_adjust": 0.0,
    "lr_adjust_coeff": 0.18,
    "muon_mode": "slice",
    "enable_gram": True,
    "magma_muon": True,
}


def schedule(section: Section, steps: int | None) -> Options:
    """Options of the learning rate.

    Args:
        section: The section learning_rate of the input, or an empty one.
        steps: Number of steps of the run; None if the input has a number of epochs.
    """
    kind = section.take("type", "exp")
    peak = section.number("start_lr", 1e-3)
    options: Options = {"schedule": kind, "learning_rate": float(peak)}
    options["final_learning_rate"] = _final_rate(section, peak)
    options |= _warmup(section, steps)
    if kind == "exp":
        _exponential(section, options, steps)
    elif kind == "wsd":
        options["decay_fraction"] = float(section.number("decay_phase_ratio", 0.1))
        if (decay := section.take("decay_type", "inverse_linear")) != "cosine":
            section.differs("decay_type", decay, "the decay follows half a cosine here")
    elif kind != "cosine":
        section.differs("type", kind, "wsd is used instead; change training.schedule to wsd, cosine or exp")
        options["schedule"] = "wsd"
    section.unused(("scale_by_worker",))
    section.close()
    return options


def _final_rate(section: Section, peak: float) -> float:
    last, ratio = section.number("stop_lr"), section.number("stop_lr_ratio")
    if last is None and ratio is None:
        section.differs("stop_lr", None, "absent; training.final_learning_rate is set to 1e-8")
        return min(1e-8, float(peak))
    if last is not None and ratio is not None:
        section.differs("stop_lr_ratio", ratio, "not used beside stop_lr")
    return float(peak * ratio if last is None else last)


def _warmup(section: Section, steps: int | None) -> Options:
    count, ratio = section.number("warmup_steps", 0), section.number("warmup_ratio", 0.0)
    factor = {"warmup_factor": float(section.number("warmup_start_factor", 0.0))}
    if count and ratio:
        section.differs("warmup_ratio", ratio, "not used beside warmup_steps")
    if count and not steps:
        section.differs(
            "warmup_steps",
            count,
            "the number of steps of an epoch is not known before training; set training.warmup_fraction to the share "
            "of all steps",
        )
        return {"warmup_fraction": 0.0} | factor
    fraction = float(count / steps if count and steps else ratio)
    if steps and int(fraction * steps) < count:  # rounded down
        fraction = math.nextafter(fraction, 1.0)
    return {"warmup_fraction": fraction} | factor


def _exponential(section: Section, options: Options, steps: int | None) -> None:
    every, rate = section.number("decay_steps", 5000), section.number("decay_rate")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"learning_rate.decay_rate = {rate} must be above 0 and at most 1")
    if rate is not None and not steps:
        section.differs(
            "decay_rate",
            rate,
            "needs the number of steps; set training.final_learning_rate to the learning rate at the end",
        )
    elif rate is not None and steps:
        decays = max(0.0, (1 - options["warmup_fraction"]) * steps / max(every, 1))
        end = options["learning_rate"] * rate**decays
        if end < options["final_learning_rate"]:
            section.differs(
                "decay_rate", rate, "would reach stop_lr before the last step; here it is reached there"
            )
        options["final_learning_rate"] = max(end, options["final_learning_rate"])
    if not section.take("smooth", False):
        section.differs(
            "decay_steps", every, "the learning rate decays at every step here, as with smooth = true"
        )


def length(section: Section) -> Options:
    """Number of steps or epochs, from the section training."""
    given = {key: n for key in _LENGTHS if (n := section.number(key)) is not None}
    if not given:
        section.differs("numb_steps", None, "absent; the run takes 200 epochs, set training.steps or epochs")
        return {}
    (key, value), *others = given.items()
    for other, number in others:
        section.differs(other, number, f"not used beside {key}")
    if _LENGTHS[key] == "epochs" and value != round(value):
        section.differs(key, value, "only whole epochs here, rounded up")
        value = math.ceil(value)
    return {_LENGTHS[key]: value}


_LENGTHS = {"numb_steps": "steps", "stop_batch": "steps"} | dict.fromkeys(
    ("numb_epoch", "num_epoch", "numb_epochs", "num_epochs"), "epochs"
)


def batches(section: Section) -> Options:
    """Size of the batches, from the section training_data.

    deepmd-kit fills a batch from one system; here, batches mix structures of all sizes.
    """
    size = section.take("batch_size", "auto")
    if _is_count(size):
        return {"batch_size": size}
    if isinstance(size, list) and size and all(map(_is_count, size)):
        if len(set(size)) > 1:
            section.differs("batch_size", size, "one number for all systems here, the largest is used")
        return {"batch_size": max(size)}
    rule, _, number = size.partition(":") if isinstance(size, str) else ("", "", "")
    number = number or ("32" if rule == "auto" else "")
    if rule not in (*_BY_ATOMS, "mixed") or not number.isdecimal() or int(number) < 1:
        section.differs("batch_size", size, "8 structures are used; set training.batch_size or max_atoms")
        return {}
    if rule == "mixed":
        return {"batch_size": int(number)}
    if rule == "filter":
        section.differs(
            "batch_size", size, f"structures with more than {number} atoms are not left out here; remove them"
        )
    return {"max_atoms": int(number)}


_BY_ATOMS = ("auto", "max", "mix", "filter")  # rules with a number of atoms


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
