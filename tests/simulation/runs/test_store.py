"""Result store: torn lines, failures, Ctrl-C, names and settings that do not fit."""

import os
import signal

import pytest

from dpa4.simulation.runs.store import ItemInterrupted, Records, run_items


def test_records_survive_a_torn_line_and_failures_are_tried_again(tmp_path):
    settings = {"task": "test", "model": "a"}
    attempts: list[str] = []

    def compute(item: int, _: list[int]) -> dict:
        attempts.append(str(item))
        if item == 2 and attempts.count("2") == 1:
            raise RuntimeError("out of memory")
        return {"square": item**2}

    def call() -> tuple:
        with Records(tmp_path, settings) as records:
            state = run_items([(str(i), i) for i in range(4)], 4, compute, records, title="x", progress=False)
            return state, {r["id"]: r.get("square") for r in records}

    state, found = call()
    assert state == (3, 1, False, "2: RuntimeError: out of memory")
    assert found == {"0": 0, "1": 1, "2": None, "3": 9}
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"id": "4", "squ')  # killed while writing
    state, found = call()
    assert (state.done, state.failed) == (4, 0)
    assert found == {"0": 0, "1": 1, "2": 4, "3": 9}
    assert attempts == ["0", "1", "2", "3", "2"]
    with pytest.raises(
        ValueError, match="model = 'b', but .* holds results with model = 'a'; choose another folder"
    ):
        Records(tmp_path, settings | {"model": "b"})
    with (
        Records(tmp_path, settings) as records,
        pytest.raises(ValueError, match="two structures have the name '0'"),
    ):
        run_items([("0", 0), ("0", 1)], 2, compute, records, title="x", progress=False)


def test_ctrl_c_between_items_and_within_one(tmp_path):
    def compute(item: int, stopped: list[int]) -> dict:
        if item == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if item == 1 and stopped and (tmp_path / "strict").exists():
            raise ItemInterrupted
        return {}

    items = [(str(i), i) for i in range(3)]
    handler = signal.getsignal(signal.SIGINT)
    with Records(tmp_path / "a", {}) as records:
        state = run_items(items, 3, compute, records, title="x", progress=False)
    assert (state.done, state.interrupted) == (2, True)  # the current item was finished
    (tmp_path / "strict").touch()
    with Records(tmp_path / "b", {}) as records:
        state = run_items(items, 3, compute, records, title="x", progress=False)
    assert (state.done, state.interrupted) == (1, True)  # the current item was abandoned
    assert signal.getsignal(signal.SIGINT) is handler
