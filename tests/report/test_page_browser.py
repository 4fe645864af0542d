"""The page in a browser: words, tables and selection. What is shown is what the comparison holds."""

from __future__ import annotations

import statistics
import time

import pytest
from chromium import FIRST, SECOND, card, finished
from hostile import hostile
from pages import all_failed, no_curves, nothing, one_group, one_run
from scipy.stats import t as student
from synthetic import compared, loaded

from uft.report.page import render
from uft.report.table import FORMS, as_text


def test_it_opens_from_disk_and_asks_for_nothing_else(page, mixed):
    page.open("mixed", mixed)
    page.chart(card(FIRST), "trace.uft")
    page.chart("#scatter", "trace.uft")
    page.chart("#parallel", "trace.uft")
    assert page.errors() == []
    assert {url.split("#")[0] for url in page.requests() if not url.startswith(("data:", "blob:", "about:"))} == {
        page.written["mixed"].as_uri()
    }
    assert page.js("return document.querySelectorAll('[data-title*=cloud], [data-title*=Share]').length") == 0


def test_headline_figures_and_comparisons_are_those_of_the_comparison(page, mixed):
    groups = {group["id"]: group for group in mixed["groups"]}
    page.click("#headline .tools button")  # all groups
    texts = """[...r.querySelectorAll(`[data-${kind}]`)].map(c => [c.dataset[kind],
        ...['.mean, .difference', '.interval'].map(name => c.querySelector(name)?.innerText ?? c.innerText)])"""
    rows = page.js(
        f"return [...document.querySelectorAll('#headline tbody tr')].map(r => "
        f"[r.dataset.group, ...['metric', 'difference'].map(kind => {texts})])"
    )
    assert [name for name, *_ in rows] == sorted(groups, key=lambda name: -groups[name]["metrics"][FIRST]["mean"])
    against = {(one["metric"], each["group"]): each for one in mixed["summary"] for each in one["against_baseline"]}
    baseline = {one["metric"]: one["baseline"] for one in mixed["summary"]}
    for name, cells, differences in rows:
        for metric, mean, interval in cells:
            stat = groups[name]["metrics"][metric]
            assert mean == f"{stat['mean']:.3f}"
            assert interval == ("one seed" if stat["n"] == 1 else f"[{stat['low']:.3f}, {stat['high']:.3f}]")
        for metric, text, interval in differences:
            if name == baseline[metric]:
                assert text == "baseline"
                continue
            found = against[metric, name]
            assert text == f"{found['difference']:+.3f}"
            assert interval == ("" if found["low"] is None else f"[{found['low']:.3f}, {found['high']:.3f}]")
    page.js("document.querySelector('.finding details').open = true")
    rows = page.until("document.querySelectorAll('.finding tbody tr').length")
    assert rows == len(mixed["summary"][0]["comparisons"])
    assert page.texts(".finding tbody tr:first-child td:last-child") == ["inside noise"]


def test_the_first_screen_is_the_answer(browser, mixed):
    browser.open("mixed", mixed, height=800)
    browser.settle()
    browser.until("document.getElementById('scatter').data")
    bottom = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    for part in ("#answer > .lead", "#headline table", "#scatter"):
        assert browser.js(bottom, part) <= 800, part
    assert browser.js("return document.querySelector('#headline .wide').scrollWidth") <= 1264, "no column is cut"
    boxes = ("#scatter .ytitle", "#scatter .main-svg")
    title, plot = (browser.js("return document.querySelector(arguments[0]).getBoundingClientRect()", b) for b in boxes)
    assert plot["top"] <= title["top"] <= title["bottom"] <= plot["bottom"], "the title of the axis is whole"
    assert browser.texts("#warnings summary") == [f"{len(mixed['warnings'])} warnings"]
    assert not browser.js("return document.getElementById('warnings').open")


def marked(page):
    page.until("document.querySelectorAll('#headline tbody tr').length")  # drawn in the next frame
    return page.js(
        """return [...document.querySelectorAll('#headline tbody tr')].map(r =>
            r.querySelector('.tag.accent')?.innerText ?? '')"""
    )


def test_best_stands_only_where_it_is_and_all_that_is_not_worse_is_marked_alike(page):
    def of(table):
        return compared(
            [loaded(o, s, final={"eval/exact_match": v}) for o, values in table.items() for s, v in enumerate(values)]
        )

    clear, close = {"uft": [0.90, 0.91, 0.92], "sft": [0.50, 0.51, 0.53]}, {"ift": [0.88, 0.93, 0.90]}
    page.open("clear", of(clear))
    assert marked(page) == ["best", ""]
    page.open("close", of({**clear, **close}))
    assert marked(page) == ["≈ best", "≈ best", ""]
    page.open("unknown", of({"uft": [0.9], "sft": [0.5]}))
    assert marked(page) == ["highest", ""], "one seed: that it is best is not known"
    page.open("even", of({"sft": [0.75], "uft": [0.75], "dpo": [0.5]}))
    assert marked(page) == ["≈ best", "≈ best", ""]


@pytest.mark.slow
def test_one_bad_arm_flattens_nothing(page):
    """Limits follow the others, arrows stand for what is outside, and hiding an arm sets new ones."""
    table = {"sft": 0.50, "ift": 0.56, "dft": 0.53, "uft": 9.0}
    curve = [{"step": step, "eval/nll": 1.0} for step in (0, 1)]
    runs = [
        loaded(o, s, final={"eval/exact_match": 0.3 + nll / 30 + s / 99, "eval/nll": nll + s / 50},
               lines=(*curve, {"step": 2, "eval/nll": nll}), data__ratio=ratio)
        for o, nll in table.items() for ratio in (0.3, 0.7) for s in (0, 1)
    ]  # fmt: skip
    page.open("flat", compared(runs))
    traces = page.chart(
        "#scatter", "{uft: trace.uft, outside: trace.outside, symbol: trace.marker?.symbol, y: trace.y}"
    )
    beyond = [trace for trace in traces if trace.get("outside")]
    assert [trace["symbol"] for trace in beyond] == ["triangle-up"] * 2
    limits = page.js("return document.getElementById('scatter').layout.yaxis.range")
    assert 0 < limits[0] < 0.5
    assert 0.6 < limits[1] < 0.9
    assert all(limits[0] < trace["y"][0] < limits[1] for trace in traces if trace["uft"] == "group")
    assert page.chart(card("eval/nll"), "trace.uft").count("outside") == 2
    assert page.js("return document.querySelector(arguments[0]).layout.yaxis.range[1]", card("eval/nll")) < 2
    page.choose("#heatmap-controls [name=metric]", "eval/nll")
    page.js("document.getElementById('heatmaps').scrollIntoView()")
    page.until("document.querySelector('#heatmaps .chart')?.data")
    [cells] = page.chart("#heatmaps .chart", "{text: trace.text, most: trace.zmax}")
    assert sum("▲" in text for row in cells["text"] for text in row) == 2
    assert cells["most"] < 0.7
    assert (
        page.js(
            "return document.querySelectorAll('#headline tr [data-metric=\"eval/nll\"] [data-outside=mean]').length"
        )
        == 2
    )
    page.click("#scatter-controls [name=whole]")
    page.chart("#scatter", "trace.uft")
    assert page.js("return document.getElementById('scatter').layout.yaxis.range[1]") > 9
    page.click("#scatter-controls [name=whole]")
    for group in ("sft", "ift", "dft"):
        for chip in page.driver.find_elements("css selector", ".chip[data-group]"):
            if chip.text.startswith(group):
                page.js("arguments[0].click()", chip)
    page.chart("#scatter", "trace.uft")
    limits = page.js("return document.getElementById('scatter').layout.yaxis.range")
    assert 8 < limits[0] < 9 < limits[1] < 10, "of what is shown"


def test_a_plot_for_every_objective(page, mixed):
    page.choose("#scatter-controls [name=per]", "objective.name")
    page.until("document.getElementById('scatter').data?.some(trace => trace.xaxis === 'x3')")
    traces = page.chart("#scatter", "{uft: trace.uft, group: trace.group, axis: trace.xaxis}")
    axes = {"ift": "x", "sft": "x2", "uft": "x3"}
    names = {group["id"]: group["name"].split()[0] for group in mixed["groups"]}
    assert {t["group"]: t["axis"] for t in traces if t["uft"] == "group"} == {g: axes[n] for g, n in names.items()}
    layout = page.js("return document.getElementById('scatter').layout")
    assert layout["xaxis"]["range"] == layout["xaxis3"]["range"]
    assert [each["text"] for each in layout["annotations"]] == [f"<b>{name}</b>" for name in axes]


def test_the_front_has_what_no_other_beats(page, mixed):
    [front] = [t for t in page.chart("#scatter", "{uft: trace.uft, x: trace.x, y: trace.y}") if t["uft"] == "front"]
    points = [tuple(group["metrics"][name]["mean"] for name in (FIRST, SECOND)) for group in mixed["groups"]]
    kept = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert [*zip(front["x"], front["y"], strict=True)] == sorted(kept)


def test_tables_commands_and_pictures_can_be_taken(page, mixed, tmp_path):
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
    for form in FORMS:
        page.click(f"[data-take={form}]")
        page.until("document.querySelector(arguments[0]).innerText === 'Copied'", f"[data-take={form}]")
        assert page.driver.execute_async_script(read) == as_text(mixed, form)
    page.click('tr[data-run="r7"] .command button')
    page.until("document.querySelector('tr[data-run=\"r7\"] .command button').innerText === 'Copied'")
    assert page.driver.execute_async_script(read) == mixed["runs"][7]["command"]
    page.click("#run-controls [name=commands]")
    page.until("document.querySelector('#run-controls [name=commands]').innerText === 'Copied'")
    commands = [run["command"] for run in mixed["runs"] if run["command"]]
    assert page.driver.execute_async_script(read).splitlines() == commands
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    page.click("[data-take=file]")
    page.chart("#scatter", "trace.uft")
    for kind in ("PNG", "SVG"):
        page.click(f"#scatter [data-title='Save as {kind}']")
    ends = time.monotonic() + 60
    while {path.name for path in tmp_path.iterdir()} < {"compare.csv", "uft.png", "uft.svg"}:
        assert time.monotonic() < ends, [*tmp_path.iterdir()]
        time.sleep(0.05)
    assert (tmp_path / "compare.csv").read_text(encoding="utf-8") == as_text(mixed, "csv")
    assert (tmp_path / "uft.svg").read_text(encoding="utf-8").startswith("<svg")
    assert (tmp_path / "uft.png").read_bytes().startswith(b"\x89PNG")
    bars = [".js-plotly-plot", "[data-title='Save as SVG']"]
    counts = page.js("return arguments[0].map(each => document.querySelectorAll(each).length)", bars)
    assert counts[0] == counts[1], "every plot"


def test_a_run_has_links_to_its_folder_and_to_wandb(page, tmp_path):
    run = loaded("uft", path=tmp_path / "a b", info={"wandb": {"url": "https://wandb.example/x"}}, final={FIRST: 0.5})
    evil = loaded("sft", info={"wandb": {"url": "javascript:alert(1)"}}, final={FIRST: 0.5})
    page.written["links"] = page.folder / "links.html"
    page.written["links"].write_text(render(compared([run, evil]), page.folder), encoding="utf-8")
    page.open("links")
    links = page.js("return [...document.querySelectorAll('#run-table a')].map(a => [a.innerText, a.href])")
    assert ["folder", f"{(tmp_path / 'a b').as_uri()}/"] in links
    assert [link for link in links if link[0] == "W&B"] == [["W&B", "https://wandb.example/x"]]


def test_sorting_both_ways_keeps_what_is_missing_last(page, mixed):
    by_id = {run["id"]: run["final"].get(FIRST) for run in mixed["runs"]}
    for descending in (False, True):
        page.click(f'#run-table th[data-column="final {FIRST}"] button')
        order = [by_id[name] for name in page.shown_runs()]
        known = [value for value in order if value is not None]
        assert known == sorted(known, reverse=descending)
        assert None not in order[:-1]
        assert order[-1] is None, "the unreadable run"
    direction = page.js(f"return document.querySelector('th[data-column=\"final {FIRST}\"]').getAttribute('aria-sort')")
    assert direction == "descending"


def test_states_in_words_and_filtering_by_text_and_status(page, mixed):
    shown = page.js(
        "return [...document.querySelectorAll('#run-table tbody tr')]"
        ".map(r => [r.dataset.run, r.querySelector('.status').innerText])"
    )
    assert {name: text.split()[-1] for name, text in shown} == {run["id"]: run["status"] for run in mixed["runs"]}
    page.choose("#run-controls [name=find]", "uft ratio0.5")
    assert set(page.shown_runs()) == {run["id"] for run in mixed["runs"] if run["name"].startswith("uft-ratio0.5")}
    assert page.texts("#run-count") == ["3 of 27 runs listed"]
    page.choose("#run-controls [name=find]", "")
    page.choose("#run-controls [name=status]", "failed")
    assert page.shown_runs() == ["r4"]
    assert mixed["runs"][4]["error"] in page.texts('tr[data-run="r4"] .error')
    page.click("#run-controls [name=take]")
    assert page.hash() == "#runs=r4"


def test_a_selection_in_the_table_is_followed_everywhere(page, mixed):
    chosen = finished(mixed, "g3")[:2]
    for run in chosen:
        page.click(f'tr[data-run="{run["id"]}"] input')
    assert page.hash() == "#runs=" + ",".join(run["id"] for run in chosen)
    assert page.texts("#selection") == ["2 of 27 runs"]
    assert len(page.shown_runs()) == 27, "one can tick more"
    means = [
        trace for trace in page.chart(card(FIRST), "{uft: trace.uft, group: trace.group}") if trace["uft"] == "mean"
    ]
    assert [trace["group"] for trace in means] == ["g3"]
    mean = statistics.fmean(run["final"][FIRST] for run in chosen)
    assert page.texts(f'#headline [data-metric="{FIRST}"] .mean') == [f"{mean:.3f}"]
    half = student.ppf(0.975, 1) * statistics.stdev(run["final"][FIRST] for run in chosen) / 2**0.5
    assert page.texts(f'#headline [data-metric="{FIRST}"] .interval') == [f"[{mean - half:.3f}, {mean + half:.3f}]"]
    assert page.texts("#difference-table .notice") == ["Nothing differs between the selected runs."]
    assert page.texts("#sample-table thead th")[1:] == [run["name"] for run in chosen]
    page.click("#all-runs")
    assert page.hash() == ""
    assert len(page.texts("#headline tbody tr")) == 5, "the first ones; all of them at a click"


def test_a_link_keeps_the_selection(browser, mixed):
    browser.open("mixed", mixed, hash="#runs=r0,r1,nobody,%zz")
    browser.until("document.querySelectorAll('#run-table tbody tr:not([hidden])').length")  # drawn with the next frame
    assert browser.shown_runs() == ["r0", "r1"], "chosen elsewhere: the table lists these"
    assert browser.texts("#selection") == ["2 of 27 runs"]
    browser.js("location.hash = '#runs=r5'")
    browser.until("document.getElementById('selection').innerText === '1 of 27 runs'")


def test_the_legend_hides_a_group_and_shows_one_alone(page, mixed):
    page.click('.chip[data-group="g0"]')
    assert page.texts("#selection") == ["24 of 27 runs"]
    pressed = "document.querySelector('.chip[data-group=\"g0\"]').getAttribute('aria-pressed')"
    assert page.js(f"return {pressed}") == "false"
    page.click('.chip[data-group="g0"]')
    assert page.hash() == ""
    page.js(
        "document.querySelector('.chip[data-group=\"g2\"]').dispatchEvent(new MouseEvent('dblclick', {bubbles: true}))"
    )
    assert page.shown_runs() == mixed["groups"][2]["runs"]


def test_differences_count_and_select(page, mixed):
    implied = ["objective.beta"]  # sft has none, and the others the same one
    shown = page.js("return [...document.querySelectorAll('#difference-table tbody th')].map(n => n.textContent)")
    assert sorted(shown) == sorted(each["key"] for each in mixed["differences"])
    assert page.texts("#difference-table > table tbody th") == [name for name in shown if name not in implied]
    assert page.texts("#difference-table > table tbody tr:last-child .chip") == ["00aa11bb\n1 run", "9f2c41d0\n25 runs"]
    page.click("#difference-table > table tbody tr:last-child li:first-child .chip")
    assert page.shown_runs() == ["r3"]


def test_samples_stand_side_by_side(page, mixed):
    heads = page.texts("#sample-table thead th")
    assert heads[1] == "sft-ratio0.25-seed1", "the baseline first"
    sample = mixed["samples"][0]
    row = page.js("return [...document.querySelector('#sample-table tbody tr').children].map(c => c.innerText)")
    last = {answer["run"]: answer for answer in sample["answers"] if answer["step"] == 800}
    assert sample["prompt"] in row[0]
    assert last["r9"]["text"] in row[1]
    assert last["r9"]["verdict"] in row[1]
    page.choose("#sample-controls [name=step]", "0")
    assert "step 0" in page.js("return document.querySelector('#sample-table tbody td').innerText")
    page.choose("#sample-controls [name=find]", sample["prompt"])
    assert page.texts("#sample-count") == ["1 of 10 prompts"]


def test_colours_follow_the_system_and_the_button(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    for theme, other in (("dark", "light"), ("light", "dark")):
        page.js("localStorage.clear(); delete document.documentElement.dataset.theme")
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        here = page.js(background)
        page.until("document.getElementById('theme').innerText.toLowerCase() === arguments[0]", other)
        page.click("#theme")
        assert page.js(background) != here
        assert page.js("return document.documentElement.dataset.theme") == other
    page.js("localStorage.clear()")


def test_everything_pressed_has_a_name_and_a_place_in_the_order(page):
    nameless = """return [...document.querySelectorAll('button, input, select, summary, a')].filter(n =>
        !(n.textContent.trim() || n.getAttribute('aria-label') || (n.labels && n.labels.length)))
        .map(n => n.outerHTML)"""
    assert page.js(nameless) == []
    assert (
        page.js('return document.querySelectorAll(\'[tabindex]:not([tabindex="0"]):not([tabindex="-1"])\').length') == 0
    )
    for_keyboard = """return [...document.querySelectorAll('.wide')]
        .filter(n => n.scrollWidth > n.clientWidth && n.tabIndex !== 0).length"""
    assert page.js(for_keyboard) == 0


def test_it_fits_a_narrow_screen(browser, mixed):
    browser.open("mixed", mixed, width=480)
    browser.chart(card(FIRST), "trace.uft")
    assert browser.js("return document.documentElement.scrollWidth") <= 480
    cut = """return [...document.querySelectorAll('#legend, #sections, .chip, .chip bdi')].filter(n =>
        n.scrollWidth > n.clientWidth + 1 || n.scrollHeight > n.clientHeight + 1).map(n => n.innerText)"""
    assert browser.js(cut) == [], "the legend is whole"
    assert browser.js("return document.querySelectorAll('.chip[data-group]').length") == len(mixed["groups"])


@pytest.mark.slow
def test_what_means_harm_is_text(browser):
    browser.open("hostile", hostile())
    for metric in browser.js(
        "return [...document.querySelectorAll('#metric-list input:not(:checked)')].map(n => n.value)"
    ):
        browser.js(
            "[...document.querySelectorAll('#metric-list input')].find(n => n.value === arguments[0]).click()", metric
        )
    browser.click("#scatter-controls [name=seeds]")
    browser.js("dispatchEvent(new Event('beforeprint'))")  # draws everything
    assert browser.js("return [...document.querySelectorAll('.chart')].every(n => n.querySelector('.main-svg'))")
    browser.js("dispatchEvent(new Event('afterprint'))")
    for summary in browser.driver.find_elements("tag name", "summary"):
        browser.js("arguments[0].click()", summary)
    assert browser.js("return window.pwned === undefined && document.scripts.length === 3")
    assert (
        browser.js("return document.querySelectorAll('img, iframe, [onerror], [onload], a[href^=javascript]').length")
        == 0
    )
    assert browser.errors() == []
    assert "<script>window.pwned=1</script>" in browser.texts("h1")[0]
    assert browser.texts('tr[data-run="r9"] [data-column="final eval/nll"]') == ["nan"]
    assert browser.texts('tr[data-run="r11"] [data-column="final eval/nll"]') == ["-inf"]
    assert browser.js("return document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize(
    "make",
    [nothing, *(pytest.param(make, marks=pytest.mark.slow) for make in (one_run, one_group, no_curves, all_failed))],
)
def test_small_comparisons_look_right_too(browser, make):
    comparison = make()
    browser.open(make.__name__, comparison)
    for section in ("answer", "runs", "differences"):
        assert browser.js("return document.getElementById(arguments[0]).offsetParent !== null", section)
    assert len(browser.shown_runs()) == len(comparison["runs"])
    hidden = browser.js("return [...document.querySelectorAll('main > section')].filter(n => n.hidden).map(n => n.id)")
    links = browser.js("return [...document.querySelectorAll('#sections a')].map(n => n.getAttribute('href').slice(1))")
    assert not set(hidden) & set(links)
    for name in browser.js(
        "return [...document.querySelectorAll('.chart')].filter(n => n.offsetParent).map(n => n.id).filter(Boolean)"
    ):
        browser.chart(f"#{name}", "trace.uft")
    assert ("curves" in hidden) == (not comparison["curves"] or not comparison["runs"])
    assert browser.errors() == []
