"""Processes that torchrun or Slurm has started for one run: the only place that reads what these programs set."""

import os
from typing import NamedTuple

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that Linux gives to clients; one for each job of a node


class Place(NamedTuple):
    """Place of this process among those of a run.

    Attributes:
        rank, size: Number of this process, from 0, and number of all processes.
        local_rank, local_size: The same among the processes of this node.
        host, port: Where the processes find each other.
        has_store: True if the launcher answers there; otherwise process 0 does.
        attempt: Number of restarts by the launcher.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    has_store: bool
    attempt: str


def launched() -> Place | None:
    """Place of this process if a launcher has started several of them: torchrun, or srun of Slurm.

    Within ``sbatch``, but outside of ``srun``, there is one process only, however many tasks the job has.

    Raises:
        ValueError: If a variable of the launcher is not a number, or processes on several nodes do not know where to
            find each other.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
        nodes = 1
    elif "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        rank, size = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
        nodes = _number("SLURM_STEP_NUM_NODES", 1)
        local_rank = _number("SLURM_LOCALID", rank)
        local_size = -(-size // nodes)
    else:
        return None
    if size < 2:
        return None
    host = os.environ.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else "")
    if not host:
        raise ValueError(
            f"the {size} processes on {nodes} nodes do not know where to find each other; put this line before srun: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    port = _number("MASTER_PORT", FIRST_PORT + _number("SLURM_JOB_ID", 0) % PORTS)
    return Place(
        rank,
        size,
        local_rank,
        local_size,
        host,
        port,
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def refuse_several(what: str) -> None:
    """Refuse work that one process does.

    Raises:
        ValueError: If a launcher has started several processes.
    """
    if (place := launched()) is not None:
        raise ValueError(
            f"{what} is done by one process, got {place.size}; start it without torchrun or srun"
        )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ValueError(
            f"the launcher set {name} = {text!r}, which is not a number; start the processes again"
        )
    return int(text)
