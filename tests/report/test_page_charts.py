"""The page's charts in a browser: what is drawn is what the comparison holds, and what is brushed selects."""

from __future__ import annotations

import base64
import statistics
import time

import pytest
from chromium import FIRST, SECOND, THIRD, card, finished
from pages import wide
from scipy.stats import t as student


def test_curves_are_means_over_finished_seeds_with_their_band(page, mixed):
    runs = finished(mixed, "g0")
    curves = [mixed["curves"]["loss"][run["id"]] for run in runs]
    columns = list(zip(*(curve["value"] for curve in curves), strict=True))
    traces = page.chart(card("loss"), "{uft: trace.uft, group: trace.group, x: trace.x, y: trace.y}")
    [mean] = [trace for trace in traces if trace.get("group") == "g0"]
    assert mean["x"] == curves[0]["step"]
    assert mean["y"] == pytest.approx([statistics.fmean(column) for column in columns], rel=1e-5)
    band = next(trace for trace in traces if trace["uft"] == "band")
    upper = [statistics.fmean(column) + statistics.stdev(column) for column in columns]
    assert band["y"][: len(upper)] == pytest.approx(upper, rel=1e-5)
    page.choose("#curve-controls [name=band]", "interval")
    band = next(trace for trace in page.chart(card("loss"), "{uft: trace.uft, y: trace.y}") if trace["uft"] == "band")
    t = student.ppf(0.975, 2) / 3**0.5
    upper = [statistics.fmean(column) + t * statistics.stdev(column) for column in columns]
    assert band["y"][: len(upper)] == pytest.approx(upper, rel=1e-5)


@pytest.mark.slow
def test_axis_smoothing_log_and_single_runs(page, mixed):
    run = finished(mixed, "g0")[0]
    given = mixed["curves"][FIRST][run["id"]]
    page.click(f'tr[data-run="{run["id"]}"] input')
    mean = "{uft: trace.uft, x: trace.x, y: trace.y}"
    for axis in ("tokens", "seconds"):
        page.click(f"#curve-controls [value={axis}]")
        [trace] = page.chart(card(FIRST), mean)
        assert trace["x"] == pytest.approx(given[axis], rel=1e-5)
    page.choose("#curve-controls [name=smoothing]", "0.5")
    [trace] = page.chart(card(FIRST), mean)
    average, weight, smoothed = 0.0, 0.0, []
    for value in given["value"]:
        average, weight = 0.5 * average + 0.5 * value, 0.5 * weight + 0.5
        smoothed.append(average / weight)
    assert trace["y"] == pytest.approx(smoothed, rel=1e-5)
    page.click("#curve-controls [name=log]")
    page.click("#curve-controls [name=seeds]")
    assert [trace["uft"] for trace in page.chart(card(FIRST), mean)] == ["single", "mean"]
    assert page.js("return document.querySelector(arguments[0])._fullLayout.yaxis.type", card(FIRST)) == "log"


def test_a_plot_of_curves_for_every_objective(page, mixed):
    page.choose("#curve-controls [name=per]", "objective.name")
    traces = page.chart(card("loss"), "{uft: trace.uft, group: trace.group, axis: trace.xaxis ?? 'x'}")
    axes = {"ift": "x", "sft": "x2", "uft": "x3"}
    names = {group["id"]: group["name"].split()[0] for group in mixed["groups"]}
    assert {t["group"]: t["axis"] for t in traces if t["uft"] == "mean"} == {g: axes[n] for g, n in names.items()}
    assert {t["axis"] for t in traces if t["uft"] == "band"} == set(axes.values())
    ranges = "['yaxis', 'yaxis2', 'yaxis3'].map(name => `${full[name].range}`)"
    found = page.js(
        f"const full = document.querySelector(arguments[0])._fullLayout; "
        f"return [new Set({ranges}).size, full.annotations.map(each => each.text)]",
        card("loss"),
    )
    assert found == [1, [f"<b>{name}</b>" for name in axes]], "one range, and a title each"
    page.choose("#curve-controls [name=per]", "")
    assert {t.get("axis") for t in page.chart(card("loss"), "{axis: trace.xaxis ?? 'x'}")} == {"x"}


@pytest.mark.slow
def test_metrics_are_found_and_chosen(page):
    assert len(page.texts(".card")) == 4, "few at first"
    page.choose("#metric-chooser [name=find]", "grad")
    offered = page.js(
        "return [...document.querySelectorAll('#metric-list label:not([hidden]) input')].map(n => n.value)"
    )
    assert offered == ["grad_norm"]
    page.click("#metric-list [value=grad_norm]")
    assert page.chart(card("grad_norm"), "trace.uft").count("mean") == 9
    page.click("#metric-list [value=grad_norm]")
    page.choose("#metric-chooser [name=find]", "")
    assert len(page.texts(".card")) == 4
    assert "not comparable between objectives" in page.texts('.card[data-metric="loss"]')[0]
    assert "never which one is better" in page.texts('.card[data-metric="loss"]')[0]


def test_scatter_has_the_groups_means_and_a_box_selects(page, mixed):
    traces = page.chart("#scatter", "{group: trace.group, x: trace.x, y: trace.y, up: trace.error_y?.array ?? null}")[
        1:
    ]
    for trace in traces:
        stats = mixed["groups"][int(trace["group"][1:])]["metrics"]
        assert (trace["x"], trace["y"]) == ([stats[FIRST]["mean"]], [stats[SECOND]["mean"]])
        assert trace["up"] == pytest.approx([stats[SECOND]["high"] - stats[SECOND]["mean"]])
    assert len(traces) == 9
    inside = [g for g in mixed["groups"] if g["metrics"][SECOND]["mean"] > 0.75]
    page.drag("#scatter", (0.64, 0.99), (0.8, 0.75))
    assert set(page.shown_runs()) == {name for group in inside for name in group["runs"]}
    assert len(page.chart("#scatter", "trace.uft")) == 10, "the rest stays, faint"
    page.choose("#scatter-controls [name=y]", THIRD)
    assert page.chart("#scatter", "trace.y")[1] == pytest.approx([mixed["groups"][0]["metrics"][THIRD]["mean"]])


@pytest.mark.slow
def test_heatmap_cells_are_means_over_runs(page, mixed):
    page.js("document.getElementById('heatmaps').scrollIntoView()")
    page.until("document.querySelector('#heatmaps .chart')")
    [trace] = page.chart("#heatmaps .chart", "{z: trace.z, ids: trace.customdata, hover: trace.hovertext}")
    runs = {run["id"]: run for run in mixed["runs"]}
    for i, ratio in enumerate([0.25, 0.5, 0.75]):
        for j, objective in enumerate(["ift", "sft", "uft"]):
            members = [runs[name] for name in trace["ids"][i][j]]
            assert {(run["config"]["objective.name"], run["config"]["data.ratio"]) for run in members} == {
                (objective, ratio)
            }
            assert trace["z"][i][j] == pytest.approx(statistics.fmean(run["final"][FIRST] for run in members))
            assert f"{len(members)} run" in trace["hover"][i][j]
    page.drag("#heatmaps .chart", (1, 2), (1, 2))
    assert page.shown_runs() == mixed["groups"][5]["runs"]


@pytest.mark.slow
def test_a_brush_on_an_axis_selects_the_runs_that_pass(page, mixed):
    page.chart("#parallel", "trace.uft")
    page.drag("#parallel", (0.9, 0.9), (1.1, 1.1))
    wanted = [run["id"] for run in mixed["runs"] if run["config"].get("data.ratio") == 0.75]
    assert page.shown_runs() == wanted
    page.drag("#parallel", (-0.1, -0.04), (0.1, 0.1))
    assert page.shown_runs() == [
        name for name in wanted if mixed["runs"][int(name[1:])]["config"]["objective.name"] == "ift"
    ]
    boxes = "document.getElementById('parallel').layout.shapes.filter(shape => shape.type === 'rect').length"
    assert page.js(f"return {boxes}") == 2
    page.click("#all-runs")
    page.chart("#parallel", "trace.uft")
    assert page.js(f"return {boxes}") == 0
    assert page.hash() == ""


@pytest.mark.slow
def test_paper_is_light_and_has_every_chart(page, mixed):
    page.open("mixed", mixed)
    page.js("document.documentElement.dataset.theme = 'dark'")
    page.js("dispatchEvent(new Event('beforeprint'))")
    assert page.js("return document.documentElement.dataset.theme") == "light"
    assert (
        page.js("return [...document.querySelectorAll('.chart')].filter(n => !n.querySelector('.main-svg')).length")
        == 0
    )
    page.js("dispatchEvent(new Event('afterprint'))")
    assert page.js("return document.documentElement.dataset.theme") == "dark"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    visible = "[...document.querySelectorAll('input, select, form, nav')].filter(n => n.offsetParent).length"
    assert page.js(f"return {visible}") == 0
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    paper = page.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")
    page.js("delete document.documentElement.dataset.theme")
    assert page.errors() == []


@pytest.mark.slow
def test_200_runs_of_500_points_open_and_respond(browser):
    browser.open("wide", wide())
    assert browser.written["wide"].stat().st_size < 15_000_000
    drawn = browser.js("return document.querySelectorAll('.js-plotly-plot').length")
    assert drawn <= 1, "charts wait until they are seen: the trade-off alone is on the first screen"
    started = time.monotonic()
    traces = browser.chart(card(FIRST), "trace.uft")
    assert time.monotonic() - started < 60, "about one second on an idle machine"
    assert traces == ["mean"] * 50
    assert len(browser.shown_runs()) == 200
    browser.choose("#run-controls [name=find]", "dpo")
    assert len(browser.shown_runs()) == 100
    browser.click("#run-controls [name=take]")
    assert browser.chart(card(FIRST), "trace.uft") == ["mean"] * 25
