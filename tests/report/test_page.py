"""The page as text: what is in it, what cannot get out of its quotes, how large it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pages
import pytest
from hostile import MILLION, SCRIPT, hostile
from shape import check

from uft.report import page
from uft.report.table import FORMS, as_text

FOLDER = Path(page.__file__).parent / "page"
SOURCES = sorted(FOLDER.iterdir())
FORBIDDEN = re.compile(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|https?://(?!www\.w3)")


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and the text of its scripts and of everything else."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[list[str]] = []  # type and text
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append([dict(attrs).get("type") or "", ""])

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1][1] += data
        elif self.cdata_elem is None:
            self.text += data


@pytest.fixture(scope="module")
def mixed():
    return pages.mixed()


@pytest.fixture(scope="module")
def elements(mixed):
    return Elements(page.render(mixed))


@pytest.fixture(scope="module")
def harm():
    html = page.render(hostile())
    assert html.encode("utf-8"), "whatever it was given"
    return Elements(html)


def policy(elements: Elements) -> str:
    known = (a for tag, a in elements.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    return next(known)["content"] or ""


def embedded(elements: Elements) -> dict:
    return json.loads(next(text for kind, text in elements.scripts if kind == "application/json"))


def decoded(data: dict, metric: str, run: str) -> dict[str, list[float] | None]:
    places = data["curves"]["runs"][metric][run]
    texts = [None if place is None else data["curves"]["arrays"][place] for place in places]
    return {
        axis: None if text is None else np.frombuffer(base64.b64decode(text), "<f4").tolist()
        for axis, text in zip(page.AXES, texts, strict=True)
    }


def test_it_is_one_file_that_may_load_nothing(elements):
    rules = dict(rule.strip().split(" ", 1) for rule in policy(elements).split(";"))
    assert rules["default-src"] == "'none'"
    assert "http" not in policy(elements)
    assert "unsafe" not in rules["script-src"]
    for tag, attributes in elements.tags:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_only_the_scripts_that_the_policy_names_are_there(elements, harm):
    for found in (elements, harm):
        allowed = re.findall(r"'sha256-([^']+)'", policy(found))
        scripts = [text for kind, text in found.scripts if not kind]
        assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts] == allowed
        assert len(scripts) == 2
        assert [tag for tag, _ in found.tags].count("script") == 3, "Plotly, the page's own, and the data"


def test_the_answer_and_the_warnings_are_there_without_any_script(elements, mixed):
    for sentence in (*mixed["summary"][0]["words"], mixed["warnings"][1]["why"], *mixed["captions"].values()):
        assert sentence in elements.text
    assert elements.text.index(mixed["warnings"][0]["what"]) < elements.text.index(mixed["summary"][0]["words"][0])


def test_the_page_holds_the_comparison(elements, mixed):
    data, given = embedded(elements), json.loads(json.dumps(mixed))
    assert data.pop("tables") == {form: as_text(mixed, form) for form in FORMS}
    assert data.pop("folders") == {}, "it lies nowhere yet"
    assert {**data, "curves": None} == {**given, "curves": None}
    assert {name: runs.keys() for name, runs in data["curves"]["runs"].items()} == {
        name: runs.keys() for name, runs in given["curves"].items()
    }
    found = decoded(data, "loss", "r5")
    for axis in page.AXES:
        assert found[axis] == pytest.approx(given["curves"]["loss"]["r5"][axis], rel=1e-6)


def test_what_means_harm_stays_text(harm):
    assert not {tag for tag, _ in harm.tags} & {"img", "iframe", "b", "object", "base"}
    assert [attributes["href"] for tag, attributes in harm.tags if tag == "a"] == ["#answer"]
    assert not [name for _, attributes in harm.tags for name in attributes if name.startswith("on")]
    assert SCRIPT in harm.text
    assert "\\u202e" in harm.text, "marks that turn the reading direction are written out"
    data = embedded(harm)
    assert data["runs"][2]["name"] == SCRIPT
    assert set(data["curves"]["runs"]) >= {"__proto__", "constructor"}


def test_links_lead_from_the_page_to_the_runs_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.link(Path("outputs/day/sweep"), "outputs/day/sweep/a b") == "./a%20b/"
    assert page.link(Path("elsewhere"), "outputs/day/javascript:x") == "./../outputs/day/javascript%3Ax/"


def test_data_cannot_leave_its_script():
    text = page.script_json({"</script><!--": "\u2028\u2029 & \ud83d ü"})
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", text)
    assert json.loads(text) == {"</script><!--": "\u2028\u2029 & \ud83d ü"}


def test_a_text_without_end_is_cut_with_a_note(harm):
    answer = next(a["text"] for a in embedded(harm)["samples"][0]["answers"] if a["text"].startswith("xxx"))
    assert len(answer) < page.PAGE_TEXT + 100
    assert answer.endswith(f"({len(MILLION) - page.PAGE_TEXT} more characters are in compare.json)")


def test_numbers_that_are_not_finite_come_through(harm):
    curve = decoded(embedded(harm), "__proto__", "r0")
    assert curve["value"][:1] == [1]
    assert np.isnan(curve["value"][1])
    assert curve["value"][2:] == [np.inf, -np.inf, np.inf], "1e300 is beyond float32"
    assert np.isnan(curve["tokens"]).all()
    assert page.plain({"a": [float("nan"), float("-inf"), 1.5]}) == {"a": ["nan", "-inf", 1.5]}


def test_arrays_that_runs_share_are_kept_once_and_too_many_points_are_thinned_evenly(monkeypatch, mixed):
    packed = page.pack({"loss": {f"r{i}": {"step": [1, 2], "tokens": [], "value": [i, i]} for i in range(5)}})
    assert len(packed["arrays"]) == 6
    assert [places[1:3] for places in packed["runs"]["loss"].values()] == [[None, None]] * 5
    room = sum(map(len, page.pack(mixed["curves"])["arrays"])) * 6 // 10
    monkeypatch.setattr(page, "CURVES", room)
    packed = page.pack(mixed["curves"])
    assert packed["every"] == 2
    assert sum(map(len, packed["arrays"])) <= room
    given = mixed["curves"]["loss"]["r0"]["step"]
    assert decoded({"curves": packed}, "loss", "r0")["step"] == [*given[:-1:2], given[-1]]
    assert "One point in 2 is drawn" in page.render(mixed)


def test_small_comparisons_are_pages():
    for make in (pages.one_run, pages.one_group, pages.no_curves, pages.all_failed, pages.nothing):
        comparison = make()
        check(comparison)
        assert len(embedded(Elements(page.render(comparison)))["runs"]) == len(comparison["runs"])


def test_every_part_is_used_short_and_speaks_no_markup():
    scripts = {path.name for path in SOURCES if path.suffix == ".js"}
    assert scripts == set(page.SCRIPTS)
    assert {path.name for path in SOURCES} - scripts == {"page.html", "page.css"}
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path.name
        assert not FORBIDDEN.search(text), path.name


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXT_ON = {
    "paper": ("ink", "quiet", "accent", "good", "bad", "warn"),
    "raised": ("ink", "quiet", "good", "bad", "warn"),
    "warn-tint": ("ink", "quiet", "warn", "accent"),
    "tint": ("accent",),
    "accent": ("on-accent",),
    "map-low": ("ink",),
    "map-middle": ("ink",),
    "map-high": ("ink",),
}


def test_text_and_lines_can_be_seen():
    sheet = (FOLDER / "page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", sheet)
    for theme in (0, 1):
        colours = {name: pair[theme] for name, *pair in pairs}
        for ground, names in TEXT_ON.items():
            for name in names:
                assert contrast(colours[name], colours[ground]) >= 4.5, (theme, name, ground)
        hues = [name for name in colours if re.fullmatch(r"g\d", name)]
        assert len(hues) == 7
        assert all(contrast(colours[name], colours["paper"]) >= 3 for name in hues)
