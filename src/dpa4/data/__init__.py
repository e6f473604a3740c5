"""Structures with labels: reading, checking, summarising and batching."""

from dpa4.data.batch import Batch
from dpa4.data.charge_spin import charges_and_spins
from dpa4.data.coverage import Coverage, coverage_of, shortest_distances
from dpa4.data.dataset import EpochBatches, FrameDataset
from dpa4.data.frame import Frame, digest
from dpa4.data.labels import LabelKeys, frame_from_atoms
from dpa4.data.plausibility import (
    implausible_labels,
    warn_of_implausible_labels,
    warn_of_reference_energies,
)
from dpa4.data.readers import read_atoms, read_frames, read_images
from dpa4.data.references import (
    is_isolated_atom,
    reference_energies,
    refitted_reference_energies,
    undetermined_changes_text,
    undetermined_elements,
    undetermined_text,
    without_isolated_atoms,
)
from dpa4.data.sources import Sources, find_sources
from dpa4.data.streaming import (
    StreamedDataset,
    StreamedFrames,
    are_streamed,
    open_streamed,
    sampled,
    unusable_text,
)
from dpa4.data.summary import (
    check_elements,
    check_labels,
    check_trained,
    label_counts,
    summarize,
)
from dpa4.data.writers import with_results, write_structures

__all__ = [
    "Batch",
    "Coverage",
    "EpochBatches",
    "Frame",
    "FrameDataset",
    "LabelKeys",
    "Sources",
    "StreamedDataset",
    "StreamedFrames",
    "are_streamed",
    "charges_and_spins",
    "check_elements",
    "check_labels",
    "check_trained",
    "coverage_of",
    "digest",
    "find_sources",
    "frame_from_atoms",
    "implausible_labels",
    "is_isolated_atom",
    "label_counts",
    "open_streamed",
    "read_atoms",
    "read_frames",
    "read_images",
    "reference_energies",
    "refitted_reference_energies",
    "sampled",
    "shortest_distances",
    "summarize",
    "undetermined_changes_text",
    "undetermined_elements",
    "undetermined_text",
    "unusable_text",
    "warn_of_implausible_labels",
    "warn_of_reference_energies",
    "with_results",
    "without_isolated_atoms",
    "write_structures",
]
