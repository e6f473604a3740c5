"""Figures: colours, labels, axes."""

import re
from xml.etree import ElementTree

import pytest

from dpa4.output import (
    new_figure,
    plain_text,
    plain_ticks,
    save_figure,
    svg_of,
)


def test_svg_figures_are_dark_on_a_dark_screen_and_always_the_same():
    def drawn() -> bytes:
        figure = new_figure(3, 2)
        axis = figure.subplots()
        axis.plot([1, 2], [3, 4], color="C1")
        axis.set_title(plain_text("$no$formula$"))
        return svg_of(figure)

    svg = drawn()
    assert svg == drawn()
    document = ElementTree.fromstring(svg)
    head, _, body = svg.decode().partition("</style>")
    light, dark = head.split("@media (prefers-color-scheme: dark)")
    for text in (light, dark):
        assert re.search(r"--c0: #\w{6};", text) and "--c9: #" in text
    assert "--c0: #000000" in light and "--c0: #000000" not in dark
    assert "#000000" not in body and "#ff7f0e" not in body and "stroke: var(--c9)" in body
    assert len(document.findall(".//{*}metadata")) == 0


def test_figures_in_grids_within_a_grid_have_their_own_labels(tmp_path):
    """Aligned over the whole figure, the labels of all columns were at the first one."""
    figure = new_figure(6, 3)
    grid = figure.add_gridspec(1, 2)
    panels = [grid[0, k].subgridspec(2, 1).subplots() for k in range(2)]
    for column in panels:
        for axis, top in zip(column, (1, 1000), strict=True):
            axis.plot([0, top])
            axis.set_ylabel("E (eV)")
    save_figure(figure, tmp_path / "figure.png", svg=True)
    places = [[axis.yaxis.label.get_window_extent().x0 for axis in column] for column in panels]
    assert places[0][0] == pytest.approx(places[0][1]) and places[1][0] == pytest.approx(places[1][1])
    assert places[1][0] > places[0][0] + 100
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0.9, 2500), ["1", "10", "100", "1000"]),
        ((9, 110), ["10", "20", "50", "100"]),
        ((4e-4, 0.012), ["0.0005", "0.001", "0.002", "0.005", "0.01"]),
        ((1e-6, 7e-3), ["1e-6", "1e-5", "1e-4", "1e-3"]),
        ((2e-5, 9e-4), ["2e-5", "5e-5", "1e-4", "2e-4", "5e-4"]),
        ((58, 248), ["100", "150", "200"]),
        ((1.12, 1.38), ["1.15", "1.2", "1.25", "1.3", "1.35"]),
    ],
)
def test_logarithmic_axes_have_plain_numbers(ends, labels):
    figure = new_figure(3, 3)
    axis = figure.subplots()
    axis.set(yscale="log", ylim=ends)
    plain_ticks(axis.yaxis)
    figure.draw_without_rendering()
    low, high = ends
    assert [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high] == labels
