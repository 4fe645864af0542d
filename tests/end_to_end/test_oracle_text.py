"""Which tokens are learned, whatever the template: logged losses equal those of masks made independently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from plain_model import Model, Render, Row, between, chatml, plain, read

ALIKE = 1e-5
EVERY = ("demonstrations", "conversations", "pairs", "labels", "scores", "negatives")
IN_PIECES = "train.micro_batch_tokens=150"
STOP = "<|im_end|>"

MARKED = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
HEADINGS = """\
{%- for message in messages -%}
  {{- '### ' + message['role'] + ':\n' + message['content'] -}}
  {{- ('<|im_end|>' if message['role'] == 'assistant' else '') + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### assistant:\n' -}}{%- endif -%}"""
BRACKETS = """\
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'] + '<|im_end|>' -}}
  {%- else -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- endif -%}
{%- endfor -%}"""

TEMPLATES: dict[str, tuple[str, Render]] = {
    "generation marks that hold the line break": (MARKED, chatml),
    "headings in plain text": (
        HEADINGS,
        between(lambda role: f"### {role}:\n", lambda role: f"{STOP * (role == 'assistant')}\n\n"),
    ),
    "a space that joins the first word of a reply": (
        BRACKETS,
        between(
            lambda role: " " if role == "assistant" else "[INST] ",
            lambda role: STOP if role == "assistant" else " [/INST]",
        ),
    ),
}


@pytest.fixture
def every_row(rows: Callable[[str], Path]) -> list[Row]:
    return [row for name in EVERY for row in read(rows(name))]


def agree(line: dict[str, Any], expected: oracle.Expected, tolerance: float = ALIKE) -> None:
    assert line["loss"] == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    assert line["nll"] == pytest.approx(expected.terms["nll"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", TEMPLATES)
def test_headers_are_never_learned(name, here, request_of, curve, tmp_path, tiny_model, every_row):
    text, render = TEMPLATES[name]
    (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
    run = here(request_of("sft", EVERY, f"data.template={tmp_path / 'template.jinja'}", IN_PIECES))
    agree(curve(run)[1], oracle.sft(Model(tiny_model, render), every_row))


@pytest.mark.parametrize("own", [True, False])
def test_without_a_template(own, here, request_of, curve, tmp_path, tiny_model, other_model, every_row):
    """Asked for, and where the tokenizer has none."""
    model, overrides = tiny_model, ["data.template=plain"]
    if not own:
        model, overrides = without_template(tiny_model, tmp_path / "base"), [f"model.path={tmp_path / 'base'}"]
    run = here(request_of("uft", EVERY, IN_PIECES, f"reference.path={other_model}", *overrides))
    agree(curve(run)[1], oracle.uft(Model(model, plain), every_row, Model(other_model, plain)))


def without_template(model: Path, place: Path) -> Path:
    from shutil import copytree

    copytree(model, place)
    (place / "chat_template.jinja").unlink()
    return place


def test_long_rows_are_cut(here, request_of, curve, tiny_model, every_row):
    """A row goes only when one of its replies has nothing left that is learned."""
    model = Model(tiny_model, length=40)
    kept = [row for row in every_row if all(any(model.tokens(row, answer).learned) for answer in row.answers)]
    assert len(kept) < len(every_row)
    settings = ("data.too_long=truncate", "train.max_length=40", f"train.batch_size={len(kept)}")
    run = here(request_of("sft", EVERY, IN_PIECES, *settings))
    agree(curve(run)[1], oracle.sft(model, kept))


def test_long_rows_are_left_out(here, request_of, rows, curve, tiny_model):
    names, model = ("demonstrations", "pairs", "negatives"), Model(tiny_model)
    every = [row for name in names for row in read(rows(name))]
    kept = [row for row in every if all(len(model.tokens(row, answer).ids) <= 45 for answer in row.answers)]
    assert len(kept) < len(every)
    settings = ("data.too_long=drop", "train.max_length=45", f"train.batch_size={len(kept)}")
    run = here(request_of("sft", names, IN_PIECES, *settings))
    agree(curve(run)[1], oracle.sft(model, kept))


@pytest.mark.parametrize("objective", [pytest.param("sft", marks=pytest.mark.slow), "uft"])
def test_bfloat16_agrees_loosely(objective, here, request_of, curve, tiny_model, other_model, every_row):
    overrides = ("model.dtype=bfloat16", f"reference.path={other_model}")
    run = here(request_of(objective, EVERY, IN_PIECES, *overrides))
    model, reference = Model(tiny_model), Model(other_model)
    expected = {"sft": lambda: oracle.sft(model, every_row), "uft": lambda: oracle.uft(model, every_row, reference)}
    agree(curve(run)[1], expected[objective](), tolerance=1e-2)
