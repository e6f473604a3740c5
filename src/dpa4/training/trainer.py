"""Training loop with exact resume, validation and checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from dpa4.data import Batch
from dpa4.execution.limits import compiles_by_default
from dpa4.potential import Potential
from dpa4.potential.checkpoint import save_potential
from dpa4.system import float32_by_default, keep_freed_memory, own_settings, stop_requests
from dpa4.training.coverage import RunCoverage
from dpa4.training.ema import MovingAverage
from dpa4.training.evaluation import error_table, predict
from dpa4.training.logs import ERROR_COLUMNS, TERMS, RunLog
from dpa4.training.loss import Loss
from dpa4.training.muon import HybridMuon
from dpa4.training.options import RunConfig
from dpa4.training.plots import plot_learning_curve
from dpa4.training.prepare import Preparation, changed_options, prepare
from dpa4.training.routing import parameter_groups
from dpa4.training.schedule import Schedule
from dpa4.training.state import load_state, save_state

if TYPE_CHECKING:
    from dpa4.training.compilation import CompiledTraining

T = TypeVar("T")

PLOT_SECONDS = 60.0  # between learning curves; drawing one takes half a second
_TARGETS = {"energy": "energy per atom", "forces": "forces", "virial": "virial per atom"}
_COUNTERS = ("step", "epoch", "batch", "best_score", "stale", "summed", "seconds")


@own_settings
@float32_by_default()
@torch.enable_grad()
def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a potential.

    Files written to the output folder of the run:

    * best.safetensors: model with the lowest validation score, with averaged weights.
    * last.safetensors: newest model.
    * last.pt: everything needed to resume.
    * train.csv, valid.csv and learning_curve.png: losses and errors.
    * run.yaml: options of the run.

    At SIGINT or SIGTERM, the current step is finished, the state is saved, and the function returns. On a CPU, a run
    that is killed at any moment and resumed yields the same numbers as an uninterrupted one.

    Args:
        config: Options of the run.
        resume: Continue the run in the output folder.
        console: Console to print to; standard output by default.

    Returns:
        Path of the best model so far.

    Raises:
        FileExistsError: If the output folder is not empty and ``resume`` is not set.
        FileNotFoundError: If there is no state to resume from.
        ValueError: If data and options do not fit together, or the state belongs to another model; also if the
            neighbour list of a structure cannot be built, after saving the state before it.
        FloatingPointError: If the loss or the gradient is not finite; the state before that step is saved.
    """
    console = console or Console()
    state = None
    if resume:
        state = load_state(config.output / "last.pt")
        for leftover in config.output.glob(".*.tmp"):  # of interrupted writes
            leftover.unlink()
    if not resume and config.output.exists() and any(config.output.iterdir()):
        raise FileExistsError(
            f"output folder {config.output} is not empty; continue that run with --resume, or choose another "
            "output"
        )
    preparation = prepare(config, console)
    trainer = Trainer(config, preparation, console)
    if state is not None:
        trainer.load(state)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "run.yaml").write_text(preparation.run_text, encoding="utf-8")
    return trainer.run()


def training_step(potential: Potential, batch: Batch, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch without excluded pairs, and its terms by name: the part of a step that is differentiated."""
    return loss(potential.of_edges(batch.graph), batch)


class Trainer:
    """Training run: its state, and the loop over its steps."""

    def __init__(self, config: RunConfig, preparation: Preparation, console: Console):
        options = config.training
        self.config, self.console, self.preparation = config, console, preparation
        self.potential, self.loss = preparation.potential, preparation.loss
        self.coverage = RunCoverage(preparation, config.output, console)
        self.potential.precision = options.precision
        self.device = self.potential.device
        keep_freed_memory(self.device)
        self.optimizer = _optimizer(config, self.potential)
        self.parameters = [p for p in self.potential.parameters() if p.requires_grad]
        self.average = MovingAverage(self.parameters, options.ema_decay) if options.ema_decay else None

        per_epoch = preparation.train.num_batches(0)
        self.total = options.steps or per_epoch * (options.epochs or 200)
        interval = options.validation_interval or max(per_epoch, math.ceil(self.total / 100))
        self.validation_interval = interval
        self.checkpoint_interval = options.checkpoint_interval or interval
        self.schedule = Schedule(
            options.schedule,
            options.learning_rate,
            options.final_learning_rate,
            self.total,
            int(options.warmup_fraction * self.total),
            options.warmup_factor,
            options.decay_fraction,
        )
        console.print(
            f"{self.total} steps, {per_epoch} per epoch; MAE/RMSE of the validation data every {interval} steps:"
        )
        self.step = 0  # finished steps
        self.epoch, self.batch = 0, 0  # of the next batch
        self.best_score, self.stale = math.inf, 0  # stale: validations since the best one
        # Sums of the loss terms, the loss and the gradient norm over the steps since the last row of train.csv.
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        self.summed, self.seconds = 0, 0.0
        self.labelled = dict.fromkeys(_TARGETS, 0)  # number of these steps with a label for each term
        self.resumed = False
        self.compiled: CompiledTraining | None = None
        self.log: RunLog  # opened by `run`, once it is known whether the run is resumed

    # --- the loop

    def run(self) -> Path:
        """Train to the last step, an early stop or a signal; return the path of the best model."""
        options, folder = self.config.training, self.config.output
        resume_step = self.step if self.resumed else None
        self.log = RunLog(folder, self.console, self.total, resume_step, options.tensorboard)
        self._compile()
        with stop_requests() as stopped, self.log:
            last_tick = last_plot = self._clock()
            for batch in self._batches():
                self.coverage.update()
                self._train_on(batch)
                now = self._clock()
                self.seconds, last_tick = self.seconds + now - last_tick, now
                done = self.step == self.total
                if self.step % options.log_interval == 0 or done:
                    self._log_step()
                self.log.step(self.step)
                if self.step % self.validation_interval == 0 or done:
                    self._validate()
                    if now > last_plot + PLOT_SECONDS:
                        plot_learning_curve(folder)
                        last_plot = self._clock()
                    done = done or self._exhausted()
                if self.step % self.checkpoint_interval == 0 or done or stopped:
                    self.save()
                if done or stopped:
                    break
        return self._finish(bool(stopped))

    def _batches(self) -> Iterator[Batch]:
        while not self._over():
            try:
                for batch in self.preparation.train.batches(self.epoch, start=self.batch):
                    if self.epoch == 0:
                        self.potential.check(batch.graph)
                    self.batch += 1
                    yield batch
            except ValueError as error:  # an unusable structure, found in the first epoch
                self.save()
                raise ValueError(
                    f"{error}. The state before it is saved in {self.config.output / 'last.pt'}; correct or remove "
                    "the structure and continue with --resume"
                ) from error
            self.epoch, self.batch = self.epoch + 1, 0

    def _train_on(self, batch: Batch) -> None:
        """Do one optimiser step."""
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.potential.train()
        masks = {"energy": batch.has_energy, "forces": batch.has_forces, "virial": batch.has_virial}
        labelled = {name: bool(mask.any()) for name, mask in masks.items()}  # on the CPU
        batch = batch.to(self.device)
        batch = batch._replace(graph=self.potential.without_excluded(batch.graph))
        loss, terms = (self._differentiate if self.compiled is None else self.compiled.step)(batch)
        norm = self._clip()
        record = torch.stack([terms["energy"], terms["forces"], terms["virial"], loss, norm])
        # The only point of a step that waits for the device: numbers that are not finite must not reach the weights.
        if not bool(torch.isfinite(record).all()):
            self._abort(record)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.step)
        self.sums += record
        self.summed += 1
        for name in _TARGETS:
            self.labelled[name] += labelled[name]
        self.step += 1

    def _differentiate(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the detached loss and its terms and leave the gradients in the parameters.

        Also the function that `CompiledTraining` calls, directly or to record it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = training_step(self.potential, batch, self.loss)
        loss.backward(inputs=self.parameters)
        return loss.detach(), terms

    def _clip(self) -> Tensor:
        """Scale the gradient down to the maximum norm; return its norm before that, in float64."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).double().norm()
        if limit := self.config.training.gradient_clip:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(gradients, scale)
        return norm

    def _abort(self, record: Tensor) -> None:
        self.batch -= 1  # a resumed run repeats this step
        self.save()
        values = ", ".join(f"{name} {v:.4g}" for name, v in zip(TERMS, record.tolist(), strict=True))
        raise FloatingPointError(
            f"step {self.step + 1} (epoch {self.epoch}, batch {self.batch}) is not finite: {values}. "
            f"The state before it is saved in {self.config.output / 'last.pt'}; look for wrong labels or "
            "atoms too close in the data, or lower training.learning_rate"
        )

    # --- compilation

    def _compile(self) -> None:
        """Compile the network if the options say so and steps are left to do."""
        option = self.config.training.compile
        if not (compiles_by_default(self.device) if option is None else option) or self._over():
            return
        from dpa4.training.compilation import CompiledTraining  # the import takes a second, with Triton

        self.compiled = CompiledTraining(self.potential, self._differentiate, self.console)
        self.compiled.start(self.preparation.train)

    def _compiled_or_eager(self, work: Callable[[], T]) -> T:
        return work() if self.compiled is None else self.compiled.run(work)

    def _clock(self) -> float:
        """Time in seconds, without compilation."""
        return time.monotonic() - (0.0 if self.compiled is None else self.compiled.seconds)

    # --- logs, validation

    def _log_step(self) -> None:
        # A step without a label for a term says nothing about the term.
        steps = {name: self.labelled.get(name, self.summed) for name in TERMS}
        sums = zip(TERMS, self.sums.tolist(), strict=True)
        row: dict[str, Any] = {name: total / steps[name] if steps[name] else None for name, total in sums}
        row |= {"step": self.step, "epoch": self.epoch, "learning_rate": self.schedule(self.step - 1)}
        self.log.train(row | {"seconds": round(self.seconds, 3)})
        self.sums.zero_()
        self.summed = 0
        self.labelled = dict.fromkeys(_TARGETS, 0)

    def _validate(self) -> None:
        """Log the errors of the averaged weights on the validation data, and save the model if it is the best."""
        batches = self.preparation.validation
        with self._evaluated_weights():
            if batches is None:
                self._save_model("best.safetensors", math.nan)
                return
            if self.compiled is not None:
                self.compiled.check_evaluation(batches)
            predictions = self._compiled_or_eager(lambda: predict(self.potential, batches.batches(0)))
            table = error_table(batches.dataset.frames, predictions)
            found = {name: r for name, quantity in _TARGETS.items() if (r := table.row(quantity))}
            errors = {
                f"{name}_{kind}": getattr(r, kind) for name, r in found.items() for kind in ("mae", "rmse")
            }
            # Mean absolute errors, whatever the kind of the loss, with its weights and in its units.
            # An absent error is not zero: without it there is no score, and NaN is never the best.
            score = sum(
                weight * (found[name].mae / 1e3 if name in found else math.nan)
                for name in _TARGETS
                if (weight := getattr(self.loss, name))
            )
            best = score < self.best_score
            self.best_score, self.stale = (score, 0) if best else (self.best_score, self.stale + 1)
            row: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "score": score, "best": int(best)}
            self.log.validation(row | dict.fromkeys(ERROR_COLUMNS) | errors)
            if best:
                self._save_model("best.safetensors", score)

    def _exhausted(self) -> bool:
        """Return whether ``patience`` is exhausted."""
        patience = self.config.training.patience
        return patience is not None and self.stale >= patience

    def _over(self) -> bool:
        """Return whether no step is left to do."""
        return self.step >= self.total or self._exhausted()

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        """Use the averaged weights, if any, at precision "high" while the context is active."""
        averaged = self.average.applied() if self.average is not None else nullcontext()
        with self.potential.at_precision("high"), averaged:
            yield

    # --- files

    def save(self) -> None:
        """Write last.safetensors, then last.pt, which alone holds everything a resumed run needs."""
        with self._evaluated_weights():
            self._save_model("last.safetensors", self.best_score if self.stale == 0 else math.nan)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {
            "options": self.preparation.run_text,
            "potential": self.potential.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.shadows if self.average is not None else None,
            "sums": self.sums,
            "labelled": self.labelled,
            "random": random,
        }
        save_state(state, self.config.output / "last.pt")

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: If the state belongs to another model or optimiser.
        """
        changed = changed_options(state["options"], self.preparation.run_text)
        fixed = [c for c in changed if c.startswith(("model.", "training.optimizer", "training.ema_decay"))]
        if fixed:
            raise ValueError(
                f"{self.config.output / 'last.pt'} cannot be resumed with other options: {'; '.join(fixed)}. "
                "Restore them or choose another output"
            )
        for change in changed:
            self.console.print(f"changed since the checkpoint: {change}", style="yellow", markup=False)
        self.potential.load_state_dict(state["potential"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            torch._foreach_copy_(self.average.shadows, [s.to(self.device) for s in state["average"]])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.sums.copy_(state["sums"])
        # States of earlier versions counted every step for every term.
        self.labelled = state.get("labelled", dict.fromkeys(_TARGETS, self.summed))
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.resumed = True
        self.console.print(f"resumed after step {self.step}")

    def _save_model(self, name: str, score: float) -> None:
        provenance = self.preparation.provenance | {"step": str(self.step)}
        if math.isfinite(score):
            provenance["validation score"] = f"{score:.6g}"
        save_potential(self.potential, self.config.output / name, provenance)

    def _finish(self, stopped: bool) -> Path:
        folder = self.config.output
        plot_learning_curve(folder)
        self.coverage.finish(stopped and self.step < self.total)
        if stopped and self.step < self.total:
            self.console.print(f"stopped after step {self.step}; continue with --resume")
        elif self._exhausted():
            self.console.print(
                f"stopped early after step {self.step}: {self.stale} validations without a better one"
            )
        best = folder / "best.safetensors"
        path = best if best.is_file() else folder / "last.safetensors"
        self.console.print(f"model: {path}", markup=False)
        return path


def _optimizer(config: RunConfig, potential: Potential) -> torch.optim.Optimizer:
    options = config.training
    groups = parameter_groups(potential.model)
    if options.optimizer == "hybrid_muon":
        return HybridMuon(groups, options.learning_rate, weight_decay=options.weight_decay)
    for group in groups:
        group["weight_decay"] = 0.0 if group["route"] == "adam" else options.weight_decay
    return torch.optim.AdamW(groups, options.learning_rate, betas=(0.9, 0.95))
