"""Output: files that survive a crash, folders of one process at a time, tables, figures, texts."""

from dpa4.output.figures import new_figure, plain_ticks, save_figure, svg_of
from dpa4.output.files import (
    LEFTOVERS_OF_SAFETENSORS,
    atomic_write,
    check_writable,
    cut_back,
    flush_to_disk,
    naming,
    remove_leftovers,
    write_json,
    write_torch,
)
from dpa4.output.folders import OutputFolder, already_there, check_replaceable, check_start, remove_files
from dpa4.output.tables import CsvLog, read_csv, rows_until, write_csv
from dpa4.output.text import (
    counted,
    html_table,
    plain_text,
    short,
    tolerate_any_encoding,
    wrapped,
    wrapped_path,
)

__all__ = [
    "CsvLog",
    "LEFTOVERS_OF_SAFETENSORS",
    "OutputFolder",
    "already_there",
    "atomic_write",
    "check_replaceable",
    "check_start",
    "check_writable",
    "counted",
    "cut_back",
    "flush_to_disk",
    "html_table",
    "naming",
    "new_figure",
    "plain_text",
    "plain_ticks",
    "read_csv",
    "remove_files",
    "remove_leftovers",
    "rows_until",
    "save_figure",
    "short",
    "svg_of",
    "tolerate_any_encoding",
    "wrapped",
    "wrapped_path",
    "write_csv",
    "write_json",
    "write_torch",
]
