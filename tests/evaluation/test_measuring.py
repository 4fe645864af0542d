"""A second `uft eval` into the same file: figures of the first stay where they are of the same weights and rows."""

from __future__ import annotations

import json

from uft.training.measuring import Measured, with_earlier

ABOUT = {"data": "f", "digests": {"f": "d"}, "rows": 64}
MODEL = {"model": "m", "dtype": "float32"}


def measured(nll=2.0, checked=True, reply="yes", **about):
    items = []
    for row in range(3):
        measures = {"nll": [nll, 1.0]} | ({"exact_match": [1.0, 1.0], "completion_length": [5, 1.0]} if checked else {})
        items.append({"source": "f", "row": f"f:{row}", "measures": measures, "reply": reply if checked else None})
    figures = {"eval/nll": {"value": nll, "n": 3}}
    figures |= {"eval/completion_length": {"value": 5.0, "n": 3 if checked else 1}}
    figures |= {"eval/exact_match": {"value": 1.0, "n": 3}} if checked else {}
    return Measured(figures, ABOUT | about, items)


def test_figures_of_a_checker_outlive_a_measurement_without_it(tmp_path):
    file, first = tmp_path / "f.json", measured()
    assert with_earlier(first, file, MODEL) == (first, [])
    file.write_text(json.dumps(MODEL | first.about | {"figures": first.figures}))
    file.with_suffix(".items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in first.items))
    found, told = with_earlier(measured(nll=2.00001, checked=False), file, MODEL)
    assert told == ["figures from before are kept: eval/exact_match"]
    assert found.figures["eval/nll"]["value"] == 2.00001
    assert found.figures["eval/exact_match"] == first.figures["eval/exact_match"]
    assert found.figures["eval/completion_length"]["n"] == 3
    assert [(item["measures"]["exact_match"], item["reply"]) for item in found.items] == [([1.0, 1.0], "yes")] * 3
    for other in (measured(nll=2.1, checked=False), measured(checked=False, rows=8)):
        found, told = with_earlier(other, file, MODEL)
        assert found == other
        assert "gone are eval/exact_match" in told[0]
    assert "gone" in with_earlier(measured(checked=False), file, MODEL | {"model": "another"})[1][0]
    assert with_earlier(measured(reply="no"), file, MODEL)[1] == []
    file.write_text("{}")
    assert "was no measurement" in with_earlier(first, file, MODEL)[1][0]
