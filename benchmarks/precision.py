"""Errors of energies and forces at each precision of a model against float64, for the structures of a file.

python benchmarks/precision.py MODEL STRUCTURES.extxyz
"""

import argparse
import json

import ase.io
import numpy as np
import torch

from dpa4.simulation import DPA4Calculator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model file")
    parser.add_argument("structures", help="file of structures, in any format ASE reads")
    options = parser.parse_args()
    frames = ase.io.read(options.structures, ":")
    exact = DPA4Calculator(options.model, dtype="float64", compile=False)
    settings = {"eager float32": {"compile": False}, "high": {}, "fast": {"precision": "fast"}}
    for name, arguments in settings.items():
        calculator = DPA4Calculator(options.model, **arguments)
        for frame in frames:
            expected, found = exact.get_forces(frame), calculator.get_forces(frame)
            energies = calculator.get_potential_energy(frame) - exact.get_potential_energy(frame)
            error = np.abs(found - expected)
            result = {"precision": name, "formula": str(frame.symbols), "device": str(calculator.device)}
            result |= {"torch": torch.__version__, "force rms (eV/A)": float(np.sqrt((expected**2).mean()))}
            result |= {"largest force error": float(error.max()), "rms": float(np.sqrt((error**2).mean()))}
            print(json.dumps(result | {"energy error (eV/atom)": energies / len(frame)}), flush=True)


if __name__ == "__main__":
    main()
