"""CSV files."""

import pytest

from dpa4.output import (
    CsvLog,
    rows_until,
)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,b\nx,2\n", "b,step\n1,2\n"])
def test_tables_that_are_not_what_was_written(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="log.csv is damaged: "):
        rows_until(path, ("step", "b"), 10)
    assert path.read_text() == text


def test_columns_that_earlier_versions_lacked_stay_empty(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ("step", "x"))
    log.write({"step": 1, "x": 5})
    log.close()
    with pytest.raises(ValueError, match="its columns are not step, x, y"):
        CsvLog(tmp_path / "log.csv", ("step", "x", "y"), resume_step=1)
    log = CsvLog(tmp_path / "log.csv", ("step", "x", "y"), resume_step=1, added=("y",))
    log.write({"step": 2, "x": 6, "y": 7})
    log.close()
    assert (tmp_path / "log.csv").read_text().split() == ["step,x,y", "1,5,", "2,6,7"]
