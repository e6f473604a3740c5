"""Progress of long work: a bar on a terminal, a widget in a notebook, lines elsewhere, such as in a log file."""

import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dpa4.output import tolerate_any_encoding

LINE_SECONDS = 30.0
"""Time between lines; shorter work prints none."""


class ProgressBar(Progress):
    """Progress through a number of items, with a status text; use as a context manager.

    Update it with ``bar.update(bar.task_ids[0], completed=..., status=...)``. A notebook shows a widget if ipywidgets
    is installed. Where there is neither a terminal nor a widget, the progress is printed as a line now and then.

    Args:
        what: Name of an item, such as "step".
        total: Number of items.
        done: Number of items finished by an earlier call.
        show: False to show nothing.
        console: Console to print to; standard output by default.
        clock: Function that returns the time, in seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        tolerate_any_encoding()  # the status may be in Å
        console = console or Console()
        is_live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        super().__init__(
            TextColumn(what),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not (show and is_live),
            get_time=clock,
        )
        self._prints_lines = show and not is_live
        self._next_line = self.get_time() + LINE_SECONDS
        self.add_task(what, total=total, completed=done, status="")

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change numbers or status of the task; arguments as in `rich.progress.Progress.update`."""
        super().update(task_id, **changes)
        self._print_line_if_due()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count further items."""
        super().advance(task_id, advance)
        self._print_line_if_due()

    def stop(self) -> None:
        """End the display; a widget, which rich leaves at its last refresh, shows the final state."""
        if self.console.is_jupyter and not self.disable:
            self.refresh()
        super().stop()

    def _print_line_if_due(self) -> None:
        if self._prints_lines and self.get_time() >= self._next_line:
            self._next_line = self.get_time() + LINE_SECONDS
            line = progress_line(self.tasks[0])
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_line(task: Task) -> str:
    """Progress of a task as text, such as ``step 1200/20000 (6 %), left 0:03:20, 312 K``."""
    total = task.total or 0
    share = f" ({100 * task.completed / total:.0f} %)" if total else ""
    parts = [f"{task.description} {task.completed:.0f}/{total:.0f}{share}"]
    if task.time_remaining is not None:
        parts.append(f"left {timedelta(seconds=round(task.time_remaining))}")
    return ", ".join([*parts, *([task.fields["status"]] if task.fields["status"] else [])])
