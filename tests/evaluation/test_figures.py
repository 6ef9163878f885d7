import numpy as np

from meap_lit.evaluation.figures import curves, heat_maps


def test_faint_lines_have_the_color_of_theirs_and_no_name():
    seeds = [{0: 1.0, 1: 2.0}, {0: 3.0, 1: 4.0}]
    (axes,) = curves({"a": {0: 2.0, 1: 3.0}, "b": {0: 0.0}}, faint={"a": seeds}, x_label="x", y_label="y").axes
    first, *faint, second = axes.lines
    assert [list(line.get_ydata()) for line in faint] == [[1, 2], [3, 4]]
    assert {line.get_color() for line in (first, *faint)} != {second.get_color()}
    assert first.get_color() == faint[0].get_color() == faint[1].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_eight_lines_have_eight_colors():
    (axes,) = curves({str(number): {0: number} for number in range(8)}, x_label="x", y_label="y").axes
    assert len({line.get_color() for line in axes.lines}) == 8


def test_panels_stand_three_in_a_row():
    panels = {str(number): np.full((1, 2), number) for number in range(5)}
    figure = heat_maps(panels, [1, 2], [0], x_label="length", y_label="depth")
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    figure.draw_without_rendering()
    places = [axes.get_position() for axes in maps]
    assert [axes.get_title() for axes in maps] == ["0", "1", "2", "3", "4"]
    assert len({round(place.y0, 3) for place in places[:3]}) == len({round(place.y0, 3) for place in places[3:]}) == 1
    assert places[3].y0 < places[0].y0
    assert [bool(axes.get_ylabel()) for axes in maps] == [True, False, False, True, False]
