"""Time and memory of a training step, and of energy and forces, for presets; a table of what fits on a machine.

    OMP_NUM_THREADS=1 python benchmarks/sizes.py                # a CPU, one thread
    python benchmarks/sizes.py paper-air mini --device cuda     # a GPU
    python benchmarks/sizes.py --from sizes.jsonl other.jsonl   # the table of earlier measurements

Structures and steps are those of speed.py: eager mode on a CPU, replayed CUDA graphs on a GPU. Every measurement is a
process of its own, because the peak memory of a process never falls, and all of them are repeated in turns. The table
has the shortest time, which other programs on the machine disturb least; for one thread of a CPU the shortest
processor time, which they disturb less still. Memory per atom is the peak minus what the process held before the
first call. It includes buffers that do not grow, so it is an upper limit. Symmetry and precision are the defaults of
training.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dpa4.model.presets import PRESETS, preset
from dpa4.model.shapes import count_parameters

SPEED = Path(__file__).with_name("speed.py")
TRAIN = {"cpu": "2x32", "cuda": "32x64"}  # frames x atoms
ATOMS = {"cpu": [64, 216], "cuda": [216, 1000, 4096]}
WAYS = {"cpu": "eager", "cuda": "replay"}
DAY = 86_400_000  # in ms
TIMESTEP = 1e-6  # in ns

Record = dict[str, Any]


def measured(arguments: list[str]) -> Iterable[Record]:
    """Yield the measurements of speed.py in another process."""
    process = subprocess.run(
        [sys.executable, str(SPEED), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode:
        print(f"speed.py {' '.join(arguments)} failed", file=sys.stderr)
    return (record for record in lines if "min_ms" in record or "error" in record)


def works(device: str, options: argparse.Namespace) -> list[list[str]]:
    """Arguments of speed.py for the training step and for each number of atoms."""
    atoms = ATOMS[device] if options.atoms is None else options.atoms
    train = ["--train", options.train or TRAIN[device], "--precision", options.precision]
    return [train, *(["--atoms", str(count)] for count in atoms)]


def measure(options: argparse.Namespace) -> list[Record]:
    """Measure every preset in every round, and append the records to the file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device not in (None, device):
        raise SystemExit(f"--device {options.device}: PyTorch finds {device} here")
    common = ["--ways", WAYS[device], "--symmetry", options.symmetry, "--repeats", str(options.repeats)]
    records = []
    with options.output.open("a", encoding="utf-8") as file:
        for _ in range(options.rounds):
            for name in options.presets:
                for work in works(device, options):
                    for record in measured([name, *common, *work]):
                        records.append(record)
                        print(line := json.dumps(record), flush=True)
                        file.write(line + "\n")
                        file.flush()
    return records


def shortest(record: Record) -> float:
    """Shortest time of a call, in ms."""
    one_thread = record["device"].endswith("threads: 1")
    return record["min_processor_ms"] if one_thread else record["min_ms"]


def mib_per_atom(record: Record) -> float:
    """Memory of a call per atom, in MiB."""
    held = record.get("reserved_gib", record["peak_gib"]) - record.get("before_gib", 0)
    return 1024 * held / record["atoms"]


def tables(records: list[Record]) -> str:
    """Markdown tables, one per device and symmetry, with a row per preset."""
    records = [record for record in records if "min_ms" in record]
    machines = sorted({(record["device"], record["symmetry"]) for record in records})
    parts = []
    for device, symmetry in machines:
        chosen = [r for r in records if (r["device"], r["symmetry"]) == (device, symmetry)]
        parts.append(f"{device}, symmetry {symmetry}:\n\n{table(chosen, symmetry)}")
    return "\n\n".join(parts)


def table(records: list[Record], symmetry: str) -> str:
    """Markdown table of the shortest times of one machine."""
    best: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record["model"], work_of(record))
        best[key] = min(record, best.get(key, record), key=shortest)
    works = list(dict.fromkeys(work for _, work in best))
    names = {name for name, _ in best}
    ordered = [name for name in PRESETS if name in names] + sorted(names - set(PRESETS))
    lines = [f"| preset | parameters | {' | '.join(works)} |", "|---" * (len(works) + 2) + "|"]
    for name in ordered:
        cells = [cell(best[name, work]) if (name, work) in best else "not measured" for work in works]
        count = count_parameters(preset(name, symmetry=symmetry)).total
        lines.append(f"| {name} | {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def work_of(record: Record) -> str:
    """Title of the column of a record."""
    if record["work"] == "train":
        return f"training step, {record['atoms']} atoms, {record['precision']} (s; MiB per atom)"
    return f"energy and forces, {record['atoms']} atoms (ms; ns/day at 1 fs; MiB per atom)"


def cell(record: Record) -> str:
    """Time, speed and memory of a record."""
    time, memory = shortest(record), f"{mib_per_atom(record):.2g}"
    if record["work"] == "train":
        return f"{time / 1000:.2g}; {memory}"
    shown = f"{time:,.0f}" if time >= 100 else f"{time:.3g}"
    return f"{shown}; {DAY / time * TIMESTEP:.2g}; {memory}"


def read(files: list[Path]) -> list[Record]:
    """Records of earlier measurements."""
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=list(PRESETS), help="names of presets; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="end with an error if this is not used")
    parser.add_argument("--train", help="frames x atoms of a training step; default: 2x32, on a GPU 32x64")
    parser.add_argument("--atoms", type=int, nargs="*", help="sizes for energy and forces")
    parser.add_argument("--precision", choices=["high", "fast"], default="high", help="of the training step")
    parser.add_argument("--symmetry", choices=["SO3", "O3"], default="O3")
    parser.add_argument("--repeats", type=int, default=8, help="calls of a measurement")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of all measurements, in turns")
    parser.add_argument("--output", type=Path, default=Path("sizes.jsonl"), help="file to append to")
    parser.add_argument(
        "--from", dest="files", type=Path, nargs="+", help="measure nothing, read these files"
    )
    options = parser.parse_args()
    print(tables(read(options.files) if options.files else measure(options)))


if __name__ == "__main__":
    main()
