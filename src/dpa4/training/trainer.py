"""Training loop with exact resume, validation and checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from dpa4.data import Batch, Coverage, EpochBatches
from dpa4.execution.limits import compiles_by_default
from dpa4.parsing import first_line
from dpa4.potential import Potential
from dpa4.potential.checkpoint import save_potential
from dpa4.system import keep_freed_memory, naming_lack_of_memory, own_settings, stop_requests
from dpa4.training.ema import MovingAverage
from dpa4.training.errors import ErrorRow
from dpa4.training.evaluation import predict
from dpa4.training.finetuning_options import FinetuneOptions
from dpa4.training.logs import ERROR_COLUMNS, TERMS, NoLog, RunLog
from dpa4.training.loss import Loss, absolute_errors
from dpa4.training.options import RunConfig
from dpa4.training.plots import plot_learning_curve
from dpa4.training.prepare import Preparation, batch_budget
from dpa4.training.processes import ALONE, Processes
from dpa4.training.resume import changes_of_run
from dpa4.training.schedule import schedule_of
from dpa4.training.scores import TARGETS, columns_of, comparison_with_start, errors_of, score_of
from dpa4.training.state import STATE, check_fits, save_state
from dpa4.training.trainable import text_of, trainable
from dpa4.training.update import Report, WeightUpdate

if TYPE_CHECKING:
    from dpa4.training.compilation import CompiledTraining

T = TypeVar("T")

PLOT_SECONDS = 120.0  # between learning curves; drawing one takes a second
MEMORY = (
    "lower training.batch_size or training.max_edges, choose a smaller model, or use a GPU with more memory or one "
    "that no other program uses; dpa4 train --dry-run tries the largest batch"
)
_COUNTERS = ("step", "epoch", "batch", "best_score", "stale", "summed", "seconds")


def training_step(potential: Potential, batch: Batch, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch without excluded pairs, and its terms by name: the part of a step that is differentiated.

    The last of the terms is not part of the loss: the absolute errors, see `absolute_errors`.
    """
    prediction = potential.of_edges(batch.graph)
    value, terms = loss(prediction, batch)
    return value, terms | {"absolute_errors": absolute_errors(prediction, batch)}


class Trainer:
    """Training run: its state, and the loop over its steps."""

    def __init__(
        self, config: RunConfig, preparation: Preparation, console: Console, processes: Processes = ALONE
    ):
        options = config.training
        self.processes = processes
        self.config, self.console, self.preparation = config, console, preparation
        self.potential, self.loss = preparation.potential, preparation.loss
        self.potential.coverage = preparation.coverage
        self.potential.precision = options.precision
        self.device = self.potential.device
        keep_freed_memory(self.device)
        per_epoch = preparation.train.num_batches(0)
        self.per_epoch = per_epoch
        self.total = options.steps or per_epoch * (options.epochs or 200)
        interval = options.validation_interval or max(per_epoch, math.ceil(self.total / 100))
        self.validation_interval = interval
        self.checkpoint_interval = options.checkpoint_interval or interval
        self.schedule = schedule_of(options, self.total, console)
        self.trained = trained = trainable(options, self.potential.model, self.schedule.peak)
        if options.finetune != FinetuneOptions():
            text = text_of(options.finetune, trained, self.potential.model)
            console.print(text, highlight=False, soft_wrap=True)
        self.optimizer = trained.optimizer
        self.average = MovingAverage(trained.parameters, options.ema_decay) if options.ema_decay else None
        self.update = WeightUpdate(
            trained.parameters, self.optimizer, self.average, options.gradient_clip, trained.low_rank
        )
        self.report: Report | None = None  # of the last step, until it is known to be finite
        self.step = 0  # finished steps
        self.epoch, self.batch = 0, 0  # of the next batch
        self.first_epoch = 0  # of the present data
        self.history: list[dict[str, str]] = []  # provenance of the data that were used before
        self.best_score, self.stale = math.inf, 0  # stale: validations since the best one
        self.summed, self.seconds = 0, 0.0  # summed: steps since the last row of train.csv
        self.labelled = dict.fromkeys(TARGETS, 0)  # number of these steps with a label for each term
        self.resumed = False
        self.compiled: CompiledTraining | None = None
        self.log: RunLog | NoLog  # opened by `run`, once it is known whether the run is resumed

    # --- the loop

    def finished(self) -> Path | None:
        """Say so and return the path of the best model if no step is left to do; else return None.

        Logs and models stay as they are. The learning curve is drawn again, because a run may be killed before that.
        """
        if not self._over():
            return None
        options = self.config.training
        if self.step < self.total:
            reason, name = f"training.patience = {options.patience} is exhausted", "patience"
        elif options.steps:
            reason, name = f"training.steps = {options.steps}", "steps"
        else:
            reason, name = f"training.epochs = {options.epochs or 200} are {self.total} steps", "epochs"
        self.console.print(
            f"nothing is left to do: {self.step} steps are done, and {reason}. To train longer, add --set "
            f"training.{name}=N with a larger N",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
        if self.processes.first:
            plot_learning_curve(self.config.output)
        return self._named_model()

    @own_settings  # the GPU of the run
    def run(self) -> Path:
        """Train to the last step, an early stop or a signal; return the path of the best model."""
        options, folder = self.config.training, self.config.output
        validated = self.preparation.validation is not None
        self.console.print(
            f"{self.total} steps, {self.per_epoch} per epoch"
            + f"; MAE/RMSE of the validation data every {self.validation_interval} steps:" * validated
        )
        # A run that was killed before its first step logs the errors of its start again.
        resume_step = (self.step or -1) if self.resumed else None
        replays = self.preparation.replay is not None and self.preparation.replay.validation is not None
        self.log = NoLog()
        if self.processes.first:
            self.log = RunLog(folder, self.console, self.total, resume_step, options.tensorboard, replays)
        self._compile()
        with stop_requests() as received, self.log:
            stopped = False
            if self.config.model.start_from and self.step == 0 and not self._over():
                self._validate_start()
            last_tick = last_plot = self._clock()
            for batch in self._batches():
                self._train_on(batch)
                stopped = self.processes.stopped(received)
                now = self._clock()
                self.seconds, last_tick = self.seconds + now - last_tick, now
                done = self.step == self.total
                if self.step % options.log_interval == 0 or done:
                    self._log_step()
                self.log.step(self.step)
                if self.step % self.validation_interval == 0 or done:
                    self._validate()
                    if self.processes.first and now > last_plot + PLOT_SECONDS:
                        plot_learning_curve(folder)
                        last_plot = self._clock()
                    done = done or self._exhausted()
                if self.step % self.checkpoint_interval == 0 or done or stopped:
                    self.save()
                if done or stopped:
                    break
        return self._finish(stopped)

    def _batches(self) -> Iterator[Batch]:
        while not self._over():
            try:
                for batch in self.preparation.train.batches(self.epoch, start=self.batch):
                    if self.epoch == self.first_epoch:
                        self.potential.check(batch.graph)
                    batch = self.processes.agree(batch)
                    self.batch += 1
                    yield batch
            except ValueError as error:  # an unusable structure, found in the first epoch
                self.processes.refuse(error)
                self.save()
                raise ValueError(
                    f"{error}. The state before it is saved in {self.config.output / STATE}; correct or remove "
                    "the structure and continue with --resume"
                ) from error
            self.epoch, self.batch = self.epoch + 1, 0

    def _train_on(self, batch: Batch) -> None:
        """Launch one optimiser step, then wait for the one before it: the device always has work."""
        counters: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "batch": self.batch - 1}
        counters |= {"summed": self.summed, "labelled": dict(self.labelled)}
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.potential.train()
        labelled = {name: bool(count) for name, count in zip(TARGETS, batch.counts.tolist(), strict=False)}
        batch = batch.to(self.device)
        batch = batch._replace(graph=self.potential.without_excluded(batch.graph))
        with naming_lack_of_memory(
            lambda: f"the gradients of a batch of {batch.graph.size}", self.device, MEMORY
        ):
            loss, terms = (self._differentiate if self.compiled is None else self.compiled.step)(batch)
        self.processes.complete(self.trained.parameters)
        self.update.receive(loss, terms, self.step)
        self.processes.add_up(self.update.received())
        (self.update.apply if self.compiled is None else self.compiled.update)()
        self._confirm(self.update.report(counters))
        self.summed += 1
        for name in TARGETS:
            self.labelled[name] += labelled[name]
        self.step += 1

    def _differentiate(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the detached loss and its terms and leave the gradients in the parameters.

        Also the function that `CompiledTraining` calls, directly or to record it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = training_step(self.potential, batch, self.loss)
        loss.backward(inputs=self.trained.inputs)
        if self.trained.low_rank is not None:
            self.trained.low_rank.pass_on_gradients()
        return loss.detach(), terms

    def _confirm(self, following: Report | None = None) -> None:
        """Wait for the last step. If it was not finite, save the state before it, which has not changed since.

        Args:
            following: Report of the step launched after it, if any.

        Raises:
            FloatingPointError: If the last step was not finite.
        """
        report, self.report = self.report, following
        if report is None or report.is_finite():
            return
        self.report = None
        self._abort(report)

    def _abort(self, report: Report) -> NoReturn:
        for name, value in report.counters.items():  # a resumed run repeats the step
            setattr(self, name, value)
        self.processes.all_fail = True  # the numbers are sums over all
        self.save()
        raise FloatingPointError(
            f"{self._not_finite(report)}. The state before it is saved in {self.config.output / STATE}; look for "
            "wrong labels or atoms too close in the data, or lower training.learning_rate"
        )

    def _not_finite(self, report: Report) -> str:
        values = ", ".join(f"{name} {v:.4g}" for name, v in zip(TERMS, report.values(), strict=True))
        counters = report.counters
        step = f"step {counters['step'] + 1} (batch {counters['batch'] + 1} of epoch {counters['epoch'] + 1})"
        return f"{step} is not finite: {values}"

    # --- compilation

    def _compile(self) -> None:
        """Compile the network if the options say so and steps are left to do."""
        option = self.config.training.compile
        if not (compiles_by_default(self.device) if option is None else option) or self._over():
            return
        from dpa4.training.compilation import CompiledTraining  # the import takes a second, with Triton

        self.compiled = CompiledTraining(self.potential, self._differentiate, self.update, self.console)
        with (
            self.processes.first_of_each_node("compilation"),
            naming_lack_of_memory(lambda: "the first batch and compiled code", self.device, MEMORY),
        ):
            self.compiled.start(self.preparation.train)

    def _compiled_or_eager(self, work: Callable[[], T]) -> T:
        return work() if self.compiled is None else self.compiled.run(work)

    def _clock(self) -> float:
        """Time in seconds, without compilation."""
        return time.monotonic() - (0.0 if self.compiled is None else self.compiled.seconds)

    # --- logs, validation

    def _log_step(self) -> None:
        self._confirm()
        # A step without a label for a term says nothing about the term.
        steps = {name: self.labelled.get(name, self.summed) for name in TERMS}
        sums = zip(TERMS, self.update.sums.tolist(), strict=True)
        row: dict[str, Any] = {name: total / steps[name] if steps[name] else None for name, total in sums}
        row |= {"step": self.step, "epoch": self.epoch, "learning_rate": self.schedule(self.step - 1)}
        row |= {
            f"{name}_mae": 1e3 * total / values if values else None
            for name, total, values in zip(TARGETS, *self.update.errors.tolist(), strict=True)
        }
        self.log.train(row | {"seconds": round(self.seconds, 3)})
        self.update.sums.zero_()
        self.update.errors.zero_()
        self.summed = 0
        self.labelled = dict.fromkeys(TARGETS, 0)

    def _validate_start(self) -> None:
        """Log the errors of the model to fine-tune as those of step 0; it is the best model until another is."""
        budget = batch_budget(self.config.training)
        batches = EpochBatches(self.preparation.train.dataset, **budget, shuffle=False)
        with self._evaluated_weights():
            self.log.start(columns_of(self._errors(batches)))
        self.best_score, self.stale = (
            math.inf,
            0,
        )  # of a run that was killed after this and before its first step
        self._validate()
        self.save()

    def _errors(self, batches: EpochBatches) -> dict[str, ErrorRow]:
        """Errors of the present weights; several processes share the work if the batches are divided."""
        with self.processes.busy("validation"):
            if self.compiled is not None:
                self.compiled.check_evaluation(batches)
            found = self._compiled_or_eager(lambda: predict(self.potential, batches.batches(0)))
        if batches.share is not None:
            found = self.processes.gathered(found, batches)
        return errors_of(batches.dataset.frames, found)

    def _validate(self) -> None:
        """Log the errors of the averaged weights on the validation data, and save the model if it is the best."""
        self._confirm()
        batches = self.preparation.validation
        with self._evaluated_weights():
            if (replay := self.preparation.replay) and replay.validation:
                row: dict[str, Any] = {"step": self.step, "epoch": self.epoch} | dict.fromkeys(ERROR_COLUMNS)
                self.log.replay(row | columns_of(self._errors(replay.validation)))
            if batches is None:
                self._save_model("best.safetensors", math.nan)
                return
            found = self._errors(batches)
            score = score_of(found, self.loss)
            best = score < self.best_score
            self.best_score, self.stale = (score, 0) if best else (self.best_score, self.stale + 1)
            row = {"step": self.step, "epoch": self.epoch, "score": score, "best": int(best)}
            epochs = self.epoch + min(self.batch / self.per_epoch, 1.0)
            self.log.validation(row | dict.fromkeys(ERROR_COLUMNS) | columns_of(found), epochs)
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
        low_rank = self.trained.low_rank
        with self.potential.at_precision("high"), averaged, low_rank.merged() if low_rank else nullcontext():
            yield

    # --- files

    def save(self) -> None:
        """Write last.safetensors, then last.pt, once the rows of the logs before it are on the disk."""
        self._confirm()
        if not self.processes.first:
            return
        with self.processes.busy("saving"):
            with self._evaluated_weights():
                self._save_model("last.safetensors", self.best_score if self.stale == 0 else math.nan)
            self.log.flush_to_disk()
            self.save_state()

    def save_state(self) -> None:
        """Write last.pt, which alone holds everything a resumed run needs."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {
            "options": self.preparation.run_text,
            "config": self.potential.config.model_dump_json(),
            "undetermined": list(self.preparation.undetermined),
            "data": self.preparation.data,
            "history": self.history,
            "coverage": self.potential.coverage.to_json() if self.potential.coverage else None,
            "provenance": self.preparation.provenance,
            "first_epoch": self.first_epoch,
            "potential": self.potential.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.preparation.replay and self.preparation.replay.references,
            "low_rank": self.trained.low_rank and self.trained.low_rank.state_dict(),
            "average": self.average.shadows if self.average is not None else None,
            "sums": self.update.sums,
            "errors": self.update.errors,
            "labelled": self.labelled,
            "random": random,
        }
        save_state(state, self.config.output / STATE)

    def load(self, state: dict[str, Any], new_data: bool = False) -> None:
        """Continue from a saved state, on other data if ``new_data`` is set.

        Raises:
            ValueError: If the state belongs to another model or optimiser or, without ``new_data``, to other data.
        """
        preparation, file = self.preparation, self.config.output / STATE
        changed, others = changes_of_run(state, preparation.run_text, preparation.data, file, new_data)
        for change in changed:
            self.console.print(f"changed since the checkpoint: {change}", style="yellow", markup=False)
        check_fits(state, self.potential.state_dict(), file)
        try:
            self._restore(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged or belongs to another run: its entries do not fit "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        self.resumed = True
        self.console.print(f"resumed after step {self.step}")
        if others:
            self._change_data(state, others)

    def _restore(self, state: dict[str, Any]) -> None:
        self.potential.load_state_dict(state["potential"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.trained.low_rank is not None:
            self.trained.low_rank.load_state_dict(state["low_rank"])
        if self.average is not None:
            torch._foreach_copy_(self.average.shadows, [s.to(self.device) for s in state["average"]])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.history, self.first_epoch = state.get("history", []), state.get("first_epoch", 0)
        # Includes data that the run has used before. Earlier versions had none, or an entry of another kind.
        # That of an imported model to fine-tune is unknown (None).
        if isinstance(coverage := state.get("coverage"), str) and self.preparation.coverage is not None:
            self.potential.coverage = self.preparation.coverage.union(Coverage.from_json(coverage))
        self.update.sums.copy_(state["sums"])
        if (errors := state.get("errors")) is not None:  # absent in states of earlier versions
            self.update.errors.copy_(errors)
        # States of earlier versions counted every step for every term.
        self.labelled = state.get("labelled", dict.fromkeys(TARGETS, self.summed))
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def _change_data(self, state: dict[str, Any], others: Sequence[str]) -> None:
        """Start the epoch and the best score anew, and remember where model and coverage come from."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.first_epoch = self.epoch
        self.best_score, self.stale = math.inf, 0
        self.history = [*self.history, state["provenance"] | {"until step": str(self.step)}]
        self.console.print(
            f"new {' and '.join(others)} data: the model keeps its elements and reference energies, the best score "
            "starts anew"
        )

    def _save_model(self, name: str, score: float) -> None:
        if not self.processes.first:
            return
        provenance = self._provenance() | {"step": str(self.step)}
        if math.isfinite(score):
            provenance["validation score"] = f"{score:.6g}"
        save_potential(self.potential, self.config.output / name, provenance)

    def _provenance(self) -> dict[str, str]:
        """Provenance of the model, with all data that the run has used."""
        own = dict(self.preparation.provenance)
        for name in ("training data", "validation data"):
            earlier = [f"{entry[name]} (until step {entry['until step']})" for entry in self.history]
            own[name] = "; ".join([*earlier, own[name]])
        return own

    def _finish(self, stopped: bool) -> Path:
        if self.processes.first:
            plot_learning_curve(self.config.output)
        if stopped and self.step < self.total:
            self.console.print(f"stopped after step {self.step}; continue with --resume")
        elif self._exhausted():
            self.console.print(
                f"stopped early after step {self.step}: {self.stale} validations without a better one"
            )
        # With other data than at step 0, scores cannot be compared.
        if (
            self.config.model.start_from
            and not self.history
            and (text := comparison_with_start(self.config.output))
        ):
            self.console.print(text, highlight=False, soft_wrap=True)
        return self._named_model()

    def _named_model(self) -> Path:
        """Print and return the path of the best model, or of the newest one if none was ever the best."""
        best = self.config.output / "best.safetensors"
        path = best if best.is_file() else self.config.output / "last.safetensors"
        self.console.print(f"model: {path}", markup=False, soft_wrap=True)
        return path
