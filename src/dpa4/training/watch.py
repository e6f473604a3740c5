"""Watch over the processes of a run: one that dies or hangs ends the run, with its reason, within a minute."""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from dpa4.training.launcher import Place

BEAT = 1.0  # s between signs of life
SILENCE = (
    25.0  # s without one, after which a process counts as dead; a launcher may need another 30 s to end it
)
SUSPICION = 5.0  # the same once a connection to some process has broken
STUCK = 45.0  # s without progress or work of the processor, while others wait
LOST = 600.0  # s without progress, while others wait
IDLE = 0.1  # processor seconds per second below which a process does not work
ACKNOWLEDGED = 5.0  # s that a failing process waits until process 0 has printed its reason


class Watch:
    """Thread of each process that gives signs of life through a store, and looks for those of the others.

    Process 0 looks at all others, and they at process 0. The first to find a fault writes the reason to the store.
    Every process that reads it there ends at once; process 0, or if it is dead process 1, prints it.

    Args:
        place: Place of this process.
        store: Connection to the store, used by this thread alone.
        host: Name of this node.
    """

    def __init__(self, place: Place, store: dist.Store, host: str):
        self.place, self.store, self.host = place, store, host
        self.progress = 0  # number of exchanges with other processes that this one has begun
        self.doing = ""  # long work of this process, for which the others wait
        self.patience = STUCK  # s; longer if steps are
        self.suspects = False  # a connection has broken
        self._lock = threading.Lock()  # of the store
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}  # last sign of life of each process, and since when
        self._moved: dict[int, tuple[str, float, float]] = {}  # progress, since when, processor time then
        self._hosts = {place.rank: host}
        self._ended = threading.Event()
        self._beat()
        self._answered = time.monotonic()  # the last time that the store was known to answer
        self._threads = [
            threading.Thread(target=work, name="dpa4-watch", daemon=True) for work in (self._run, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def name(self, rank: int) -> str:
        """Name of a process for messages, such as "process 3 of 8 on node2"."""
        host = self._hosts.get(rank)
        return f"process {rank} of {self.place.size}" + (f" on {host}" if host else "")

    def announce(self, reason: str) -> None:
        """Tell all processes why this one ends, and wait until process 0 has printed it."""
        with self._lock, suppress(RuntimeError):
            if self.store.check(["failed"]):
                return
            self.store.set("failed", f"{self.name(self.place.rank)}: {reason}")
        if self.place.rank == 0:
            return
        end = time.monotonic() + ACKNOWLEDGED
        with suppress(RuntimeError):
            while time.monotonic() < end and not self.store.check(["told"]):
                time.sleep(BEAT / 10)

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                with self._lock:
                    reason = self._look()
            except RuntimeError:  # the store is gone with the process that held it
                reason = f"{self.name(0)} or the launcher has ended without a word"
                time.sleep(BEAT)
            self._answered = time.monotonic()
            if reason is not None and not self._ended.is_set():
                self._end(reason)

    def _guard(self) -> None:
        """End this process if the store does not answer: a process that is stopped keeps its connections."""
        while not self._ended.wait(BEAT):
            if (seconds := time.monotonic() - self._answered) > SILENCE + BEAT:
                holder = "the launcher" if self.place.has_store else self.name(0)
                self._end(
                    f"{holder} has given no sign of life for {seconds:.0f} s: it was stopped, or its node is down"
                )

    def _look(self) -> str | None:
        """Give a sign of life, and return the reason to end the run, if there is one."""
        if self.store.check(["failed"]):
            return self.store.get("failed").decode()
        self._beat()
        if self.suspects:
            self.store.set("suspicion", "")
        elif self.place.rank == 0:
            self.suspects = self.store.check(["suspicion"])
        others = range(1, self.place.size) if self.place.rank == 0 else [0]
        now = time.monotonic()
        found = self._signs(others)
        for rank, sign in found.items():
            if self._seen.get(rank, ("", now))[0] != sign:
                self._seen[rank] = sign, now
        reason = self._dead(now) or self._stuck(found, now)
        if reason is not None:
            self.store.set("failed", reason)
        return reason

    def _beat(self) -> None:
        self._beats += 1
        if self._beats == 1:
            self.store.set(f"host/{self.place.rank}", self.host)
        sign = f"{self._beats} {self.progress} {time.process_time():.3f} {self.doing}"
        self.store.set(f"beat/{self.place.rank}", sign)

    def _signs(self, ranks: "range | list[int]") -> dict[int, str]:
        """Last signs of life; of a process that has not begun there is none."""
        begun = [r for r in ranks if r in self._seen or self.store.check([f"beat/{r}"])]
        values = self.store.multi_get([f"beat/{r}" for r in begun]) if begun else []
        for rank in begun:
            if rank not in self._hosts:
                self._hosts[rank] = self.store.get(f"host/{rank}").decode()
        return {r: value.decode() for r, value in zip(begun, values, strict=True)}

    def _dead(self, now: float) -> str | None:
        limit = SUSPICION if self.suspects else SILENCE
        for rank, (_, since) in self._seen.items():
            if now - since > limit:
                return (
                    f"{self.name(rank)} has given no sign of life for {now - since:.0f} s: it was killed (by the "
                    "system for lack of memory?) or stopped, or its node is down"
                )
        return None

    def _stuck(self, found: dict[int, str], now: float) -> str | None:
        """Look for a process that the others wait for, although it does nothing; only process 0 knows all."""
        if self.place.rank != 0:
            return None
        found = found | {0: f"0 {self.progress} {time.process_time():.3f} {self.doing}"}
        signs = {rank: sign.split(" ", 3) for rank, sign in found.items()}
        furthest = max(int(count) for _, count, _, _ in signs.values())
        for rank, (_, count, processor, doing) in signs.items():
            before = self._moved.get(rank)
            if before is None or before[0] != count or doing:
                self._moved[rank] = count, now, float(processor)
                continue
            seconds = now - before[1]
            idle = float(processor) - before[2] < IDLE * seconds
            limit = self.patience if idle else max(LOST, self.patience)
            if int(count) < furthest and seconds > limit:
                return f"{self.name(rank)} has done nothing for {seconds:.0f} s while the others wait for it"
        return None

    def _end(self, reason: str) -> None:
        """End this process, whose main thread may wait for a process that is no more."""
        first = 1 if reason.startswith("process 0 ") else 0
        if self.place.rank == first:
            console = Console(stderr=True)
            console.show_cursor()
            text = Text.assemble(
                ("error:", "bold red"), f" {reason}. The run ends; continue it with --resume"
            )
            console.print(text, soft_wrap=True)
            if not reason.startswith((self.name(0), "the launcher")):  # whose store may not answer
                with suppress(RuntimeError):
                    self.store.set("told", "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def connect(place: Place, serve: bool, seconds: float) -> dist.Store:
    """Connection of this process to the store of a run.

    Args:
        place: Place of this process.
        serve: True to hold the store as well.
        seconds: Longest time to wait for the store, or for a value in it.

    Raises:
        TimeoutError: If there is no store at the address.
    """
    try:
        store = dist.TCPStore(
            place.host,
            place.port,
            is_master=serve,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise TimeoutError(
            f"process {place.rank} of {place.size} cannot reach process 0 at {place.host}:{place.port}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return dist.PrefixStore(f"dpa4/{place.attempt}", store)
