import numpy as np
import pytest

from meap_lit.evaluation.figures import curves, heat_maps, log_ticks


def test_faint_lines_have_the_color_of_theirs_and_no_name():
    seeds = [{0: 1.0, 1: 2.0}, {0: 3.0, 1: 4.0}]
    (axes,) = curves(
        {"a": {0: 2.0, 1: 3.0}, "b": {0: 0.0}}, faint={"a": seeds}, x_label="x", y_label="y", title="t"
    ).axes
    first, *faint, second = axes.lines
    assert [list(line.get_ydata()) for line in faint] == [[1, 2], [3, 4]]
    assert {line.get_color() for line in (first, *faint)} != {second.get_color()}
    assert first.get_color() == faint[0].get_color() == faint[1].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_eight_lines_have_eight_colors():
    (axes,) = curves({str(number): {0: number} for number in range(8)}, x_label="x", y_label="y", title="t").axes
    assert len({line.get_color() for line in axes.lines}) == 8


def test_panels_stand_three_in_a_row():
    panels = {str(number): np.full((1, 2), number) for number in range(5)}
    figure = heat_maps(panels, [1, 2], [0], x_label="length", y_label="depth", title="t")
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    figure.draw_without_rendering()
    places = [axes.get_position() for axes in maps]
    assert [axes.get_title() for axes in maps] == ["0", "1", "2", "3", "4"]
    assert len({round(place.y0, 3) for place in places[:3]}) == len({round(place.y0, 3) for place in places[3:]}) == 1
    assert places[3].y0 < places[0].y0
    assert [bool(axes.get_ylabel()) for axes in maps] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 64, 256, 1024, 3900], [0, 64, 256, 1024, 3900]),
        ([2**power for power in range(17)], [4**power for power in range(9)]),
        (range(163_840, 6_144_001, 163_840), [200_000, 500_000, 1_000_000, 2_000_000, 5_000_000]),  # a run of the study
        (range(20_480, 61_441, 2048), [30_000, 40_000, 50_000, 60_000]),
        (range(40_960, 57_345, 2048), [45_000, 50_000, 55_000]),
        ([0], [0]),
    ],
)
def test_a_logarithmic_axis_has_ticks_that_a_person_reads(values, ticks):
    assert log_ticks(list(values)) == pytest.approx(ticks)


def test_numbers_at_ticks():
    (axes,) = curves({"a": dict.fromkeys((0, 4096, 65_536, 6_100_000), 1.0)}, x_label="x", y_label="y", title="t").axes
    write = axes.xaxis.get_major_formatter()
    assert [write(value, 0) for value in (0, 0.15, 4096, 65_536, 6_100_000)] == ["0", "0.15", "4,096", "65.54k", "6.1M"]
