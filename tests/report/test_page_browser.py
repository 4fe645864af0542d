"""The page in a browser: words, tables and selection. What is shown is what the comparison holds."""

from __future__ import annotations

import statistics

import pytest
from chromium import FIRST, card, figure, finished
from hostile import hostile
from pages import all_failed, no_curves, nothing, one_group, one_run
from scipy.stats import t as student
from synthetic import compared, loaded


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
    rows = page.js(
        """return [...document.querySelectorAll('#headline tbody tr')].map(r => [r.dataset.group,
            [...r.querySelectorAll('[data-metric]')].map(c =>
                [c.dataset.metric, ...['.mean', '.interval'].map(name => c.querySelector(name).innerText)])])"""
    )
    assert [name for name, _ in rows] == sorted(groups, key=lambda name: -groups[name]["metrics"][FIRST]["mean"])
    for name, cells in rows:
        for metric, mean, interval in cells:
            stat = groups[name]["metrics"][metric]
            assert mean == figure(stat["mean"])
            assert interval == ("one seed" if stat["n"] == 1 else f"[{figure(stat['low'])}, {figure(stat['high'])}]")
    page.click(".finding details summary")
    rows = page.until("document.querySelectorAll('.finding tbody tr').length")
    assert rows == len(mixed["summary"][0]["comparisons"])
    assert page.texts(".finding tbody tr:first-child td:last-child") == ["inside noise"]


def test_groups_with_one_mean_are_both_best(page):
    even = [loaded(name, final={"eval/nll": value}) for name, value in (("sft", 0.5), ("uft", 0.5), ("dpo", 0.75))]
    page.open("even", compared(even))
    marked = page.js(
        "return [...document.querySelectorAll('#headline tbody tr')].map(r => !!r.querySelector('.mean.best'))"
    )
    assert marked == [True, True, False]


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
    assert page.texts(f'#headline [data-metric="{FIRST}"] .mean') == [figure(mean)]
    half = student.ppf(0.975, 1) * statistics.stdev(run["final"][FIRST] for run in chosen) / 2**0.5
    assert page.texts(f'#headline [data-metric="{FIRST}"] .interval') == [
        f"[{figure(mean - half)}, {figure(mean + half)}]"
    ]
    assert page.texts("#difference-table .notice") == ["Nothing differs between the selected runs."]
    assert page.texts("#sample-table thead th")[1:] == [run["name"] for run in chosen]
    page.click("#all-runs")
    assert page.hash() == ""
    assert len(page.texts("#headline tbody tr")) == len(mixed["groups"])


def test_a_link_keeps_the_selection(browser, mixed):
    browser.open("mixed", mixed, hash="#runs=r0,r1,nobody,%zz")
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
    assert page.texts("#difference-table tbody th") == [each["key"] for each in mixed["differences"]]
    assert page.texts("#difference-table tbody tr:last-child .chip") == ["00aa11bb\n1 run", "9f2c41d0\n25 runs"]
    page.click("#difference-table tbody tr:last-child li:first-child .chip")
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


def test_the_command_is_copied(page, mixed):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.click('tr[data-run="r7"] .command button')
    page.until("document.querySelector('tr[data-run=\"r7\"] .command button').innerText === 'Copied'")
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
    assert page.driver.execute_async_script(read) == mixed["runs"][7]["command"]


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
        !(n.innerText.trim() || n.getAttribute('aria-label') || (n.labels && n.labels.length))).map(n => n.outerHTML)"""
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
