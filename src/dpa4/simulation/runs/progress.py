"""The progress bar of the simulations."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(what: str, total: int, done: int = 0, show: bool = True) -> Progress:
    """A bar with one task that counts ``what`` and shows a free text; silent where there is no terminal.

    Update it by ``bar.update(bar.task_ids[0], completed=..., status=...)``.
    """
    status = TextColumn("{task.fields[status]}")
    bar = Progress(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), status)
    bar.disable = not show or not bar.console.is_terminal
    bar.add_task(what, total=total, completed=done, status="")
    return bar
