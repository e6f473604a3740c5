"""Progress bar of the simulations."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(what: str, total: int, done: int = 0, show: bool = True) -> Progress:
    """Progress bar with one task that counts ``what``, and a status text; hidden unless the output is a terminal.

    Update it by ``bar.update(bar.task_ids[0], completed=..., status=...)``.
    """
    status = TextColumn("{task.fields[status]}")
    bar = Progress(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), status)
    bar.disable = not show or not bar.console.is_terminal
    bar.add_task(what, total=total, completed=done, status="")
    return bar
