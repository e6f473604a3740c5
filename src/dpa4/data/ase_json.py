"""JSON of ASE, in databases and trajectories, with a check of the sizes that it declares."""

import json
from typing import IO, Any

import numpy as np
from ase.io import jsonio
from ase.io.ulm import read_header, readints

LONGEST_TEXT = 2**12  # bytes of one element of an array of texts


def decode(text: str) -> Any:
    """Decode the JSON of ASE, whose arrays must be as large as their list of numbers.

    ASE allocates and fills an array of whatever shape is written, even if there is a single number.
    """
    return jsonio.numpyfy(jsonio.fix_int_keys_in_dicts(_decoder.decode(text)))


def _checked_object(values: dict[str, Any]) -> Any:
    if "__ndarray__" in values:
        shape, name, numbers = values["__ndarray__"]
        dtype = np.dtype(name)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * (2 if dtype.kind == "c" else 1)
        given = len(numbers) if isinstance(numbers, list) else 1
        if size != given or dtype.kind not in "biufcSU" or dtype.itemsize > LONGEST_TEXT:
            raise ValueError(f"an array of shape {shape} and type {name} is written with {given} numbers")
    return jsonio.object_hook(values)


_decoder = json.JSONDecoder(object_hook=_checked_object)


def check_trajectory(file: IO[bytes]) -> None:
    """Check the JSON of every frame of an ASE trajectory, and go back to the start of the file.

    Raises:
        ValueError: If a frame declares an array that is larger than its list of numbers.
    """
    for offset in read_header(file)[-1].tolist():
        file.seek(offset)
        size = int(readints(file, 1)[0])
        decode(file.read(size).decode())
    file.seek(0)
