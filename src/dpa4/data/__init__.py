"""Structures, their labels, and batches of them."""

from dpa4.data.dataset import Batch, EpochBatches, FrameDataset
from dpa4.data.frame import Frame
from dpa4.data.labels import LabelKeys, frame_from_atoms
from dpa4.data.readers import read_frames
from dpa4.data.references import is_isolated_atom, reference_energies, without_isolated_atoms
from dpa4.data.summary import check_charge_spin, check_elements, check_labels, label_counts, summarize

__all__ = [
    "Batch",
    "EpochBatches",
    "Frame",
    "FrameDataset",
    "LabelKeys",
    "check_charge_spin",
    "check_elements",
    "check_labels",
    "frame_from_atoms",
    "is_isolated_atom",
    "label_counts",
    "read_frames",
    "reference_energies",
    "summarize",
    "without_isolated_atoms",
]
