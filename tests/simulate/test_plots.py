"""Plots: the curves are what happened, and the file is a chart with its units."""

import xml.etree.ElementTree as ElementTree

import pytest

from coordinator.sim.engine import simulate
from coordinator.sim.model import Chance, Fleet, SimJob
from coordinator.sim.plots import Shown, files
from coordinator.sim.policies import Fifo
from coordinator.sim.report import figures
from coordinator.sim.svg import Band, Chart, Curve, draw, round_step, stack

FLEET = Fleet({"A100": 1, "K80": 2}, {"A100": 2.0, "K80": 0.5})
SVG = "{http://www.w3.org/2000/svg}"


def shown(name: str = "fifo", chance: Chance | None = None) -> Shown:
    """One type is busy for two hours and has a queue in the first; the other is never used."""
    jobs = {
        n: SimJob(job_id=n, gpus=1, steps=3600, rates={"A100": 1.0}, arrival_ms=1000)
        for n in (1, 2)
    }
    return Shown(name, simulate(jobs.values(), FLEET, Fifo(), chance), jobs, FLEET)


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 (we have written it)


def curves(text: str) -> dict[str, list[tuple[float, float]]]:
    """By the legend: each curve is followed by its sample and its name."""
    root = parsed(text)
    found, seen = {}, []
    for each in root:
        if each.tag == f"{SVG}polyline":
            seen.append(each.attrib["points"])
        elif seen:
            pairs = [pair.split(",") for pair in seen[0].split()]
            found[str(each.text)] = [(float(x), float(y)) for x, y in pairs]
            seen = []
    return found


def words(text: str) -> list[str]:
    return [each.text or "" for each in parsed(text).iter(f"{SVG}text")]


def test_there_is_a_file_for_each_figure_and_it_says_its_units() -> None:
    drawn = files([shown("a"), shown("b & <c>")])
    assert sorted(drawn) == [
        "completion.svg", "cost.svg", "fairness.svg", "queue.svg",
        "utilisation-a.svg", "utilisation-b-c.svg",
    ]  # fmt: skip
    for name, text in drawn.items():
        said = words(text)
        assert any(unit in label for label in said for unit in (", h", "time taken /")), name
        assert "b & <c>" in " ".join(said) or name == "utilisation-a.svg"
    assert "of the GPUs that work, %" in words(drawn["utilisation-a.svg"])
    assert "US dollars so far" in words(drawn["cost.svg"])
    assert drawn == files([shown("a"), shown("b & <c>")])


def test_the_curves_are_what_happened() -> None:
    run = shown()
    drawn = files([run])
    used = curves(drawn["utilisation-fifo.svg"])
    top, bottom = 48.0, 402.0
    assert {y for _, y in used["A100"]} == {top}, "all of the time all of it"
    assert {y for _, y in used["K80"]} == {bottom}
    queue = curves(drawn["queue.svg"])["fifo"]
    half = len(queue) // 2
    assert len({y for _, y in queue[:half]}) == 1
    assert queue[0][1] < bottom
    assert {y for _, y in queue[half:]} == {bottom}
    said = figures(run.outcome, run.jobs, FLEET)
    assert f"fifo (${said.provisioned_cost:,.0f})" in words(drawn["cost.svg"])
    (cost,) = curves(drawn["cost.svg"]).values()
    assert [y for _, y in cost] == sorted((y for _, y in cost), reverse=True), "it only grows"
    done = curves(drawn["completion.svg"])["fifo"]
    assert done[-1][1] == top
    assert done[0][1] == bottom


def test_gpus_that_are_down_are_not_of_those_that_work() -> None:
    chance = Chance(seed=5, node_mtbf_h=2.0, node_gpus=1, mend_h=0.3)
    run = shown(chance=chance)
    assert [line.gpu_type for line in run.outcome.lines if line.what == "fail"]
    for points in curves(files([run])["utilisation-fifo.svg"]).values():
        assert all(48.0 <= y <= 402.0 for _, y in points)


@pytest.mark.parametrize(("least", "step"), [(0.7, 1), (1.0, 1), (1.1, 2), (3, 5), (60, 100)])
def test_steps_are_round(least: float, step: float) -> None:
    assert round_step(least) == step


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(5.0, 3.0)], [(1e-12, 1.0), (1e9, 2.0)]])
def test_whatever_the_points_a_chart_is_drawn(points: list[tuple[float, float]], log: bool) -> None:
    text = draw(Chart("t", "x, h", "y", [Curve("c", points)], log_x=log))
    assert {"t", "x, h", "y", "c"} <= set(words(text))


def test_many_curves_are_told_apart() -> None:
    text = draw(Chart("t", "x", "y", [Curve(f"c{n}", [(0, 0), (1, n)]) for n in range(24)]))
    lines = parsed(text).findall(f"{SVG}polyline")
    styles = {(each.attrib["stroke"], each.attrib["stroke-dasharray"]) for each in lines}
    assert len(styles) == 24


def test_a_curve_that_lies_on_others_lets_them_through() -> None:
    flat = [(0.0, 1.0), (10.0, 1.0)]
    apart = [(0.0, 0.5), (10.0, 0.5)]
    crossing = [(0.0, 0.0), (10.0, 2.0)]
    named = [("a", flat), ("b", flat), ("c", apart), ("d", crossing), ("e", flat)]
    text = draw(Chart("t", "x", "y", [Curve(name, points) for name, points in named]))
    lines = parsed(text).findall(f"{SVG}polyline")
    dashes = [each.attrib["stroke-dasharray"] for each in lines[::2]]
    assert dashes == ["none", "7 6", "none", "none", "7 12"]
    assert [each.attrib["stroke-dasharray"] for each in lines[1::2]] == dashes, "as in the legend"


def test_charts_below_one_another_do_not_overlap() -> None:
    """The first has more curves than fit beside a chart of the usual height, and is taller."""
    many = [Curve(f"curve {number}", [(0.0, 1.0), (1.0, 2.0)]) for number in range(30)]
    tall = Chart("Many", "time, h", "GPUs", many)
    low = Chart("Few", "time, h", "GPUs", many[:1])
    root = parsed(stack([tall, low]))
    groups = root.findall(f"{SVG}g")
    heights = [int(group[0].attrib["height"]) for group in groups]
    assert [group.attrib["transform"] for group in groups] == [
        "translate(0 0)",
        f"translate(0 {heights[0]})",
    ]
    assert heights[0] > heights[1]
    assert int(root.attrib["height"]) == sum(heights)


def test_no_name_of_the_legend_is_cut_and_bands_look_there_as_they_do_in_the_plot() -> None:
    line = [(0.0, 1.0), (1.0, 2.0)]
    name = "NVIDIA RTX 6000 Ada Generation: should be on"
    area = [(x, y, y + 1) for x, y in line]
    bands = [Band("90%", area), Band("50%", area)]
    root = parsed(draw(Chart("Long", "time, h", "GPUs", [Curve(name, line)], bands=bands)))
    (said,) = (each for each in root.iter(f"{SVG}text") if each.text == name)
    assert int(root.attrib["width"]) >= float(said.attrib["x"]) + 6.5 * len(name)
    boxes = [each for each in root.iter(f"{SVG}rect") if "fill-opacity" in each.attrib]
    places = [box.attrib["y"] for box in boxes]
    assert [places.count(place) for place in sorted(set(places), key=float)] == [1, 2]
    short = parsed(draw(Chart("Short", "time, h", "GPUs", [Curve("on", line)])))
    assert short.attrib["width"] == "900"
