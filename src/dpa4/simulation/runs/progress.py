"""Progress bar of simulations and benchmarks."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpa4.output import tolerate_any_encoding


def progress_bar(what: str, total: int, done: int = 0, show: bool = True) -> Progress:
    """Create a progress bar with one task, which counts ``what``, and a status text; hidden unless on a terminal.

    Update the bar with ``bar.update(bar.task_ids[0], completed=..., status=...)``.
    """
    tolerate_any_encoding()  # the status may be in Å
    status = TextColumn("{task.fields[status]}")
    bar = Progress(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), status)
    bar.disable = not show or not bar.console.is_terminal
    bar.add_task(what, total=total, completed=done, status="")
    return bar
