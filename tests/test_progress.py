"""Progress: lines in log files, a bar on a terminal, a widget in a notebook."""

import io
import sys
import types

from rich.console import Console

from dpa4 import progress
from dpa4.progress import ProgressBar


def work(console, seconds=10, show=True):
    """Ten steps of so many seconds."""
    now = [0.0]
    with ProgressBar("step", 10, show=show, console=console, clock=lambda: now[0]) as bar:
        for step in range(1, 11):
            now[0] += seconds
            bar.update(bar.task_ids[0], completed=step, status=f"{300 + step} K")


def test_a_log_file_gets_lines_now_and_then():
    log = io.StringIO()
    work(Console(file=log))
    lines = log.getvalue().splitlines()
    assert [line.partition(" (")[0] for line in lines] == ["step 3/10", "step 6/10", "step 9/10"]
    assert lines[0] == "step 3/10 (30 %), left 0:01:10, 303 K"
    assert "\x1b" not in log.getvalue()


def test_short_work_and_hidden_progress_print_nothing():
    log = io.StringIO()
    work(Console(file=log), seconds=2)
    work(Console(file=log), seconds=100, show=False)
    assert not log.getvalue()


def test_a_terminal_gets_a_bar():
    log = io.StringIO()
    work(Console(file=log, force_terminal=True, width=80))
    assert "10/10" in log.getvalue() and "━" in log.getvalue() and "30 %" not in log.getvalue()


def test_a_notebook_gets_a_widget(monkeypatch):
    shown = []

    class Output:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def clear_output(self, wait):
            shown.append(bar.tasks[0].completed)

    modules = {"ipywidgets": types.ModuleType("ipywidgets"), "IPython": types.ModuleType("IPython")}
    modules["IPython.display"] = types.ModuleType("IPython.display")
    modules["ipywidgets"].Output = Output
    modules["IPython.display"].display = shown.append
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "find_spec", lambda name: modules.get(name))
    bar = ProgressBar("step", 10, console=Console(force_jupyter=True))
    with bar:
        bar.update(bar.task_ids[0], completed=10)
    assert isinstance(shown[0], Output)
    assert [entry for entry in shown if isinstance(entry, float | int)][-1] == 10


def test_a_notebook_without_widgets_gets_lines(monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda _: None)
    printed = []
    console = Console(force_jupyter=True)
    monkeypatch.setattr(console, "print", lambda line, **_: printed.append(line))
    work(console)
    assert [line.partition(" (")[0] for line in printed] == ["step 3/10", "step 6/10", "step 9/10"]
