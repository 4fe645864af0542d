"""IFEval's instructions: for each, replies that follow it and replies that do not; and real rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uft.data.rows import Message, Row
from uft.rewards import check, judge
from uft.rewards.ifeval import INSTRUCTIONS, loosened
from uft.sampling.rollouts import unjudged

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ifeval.jsonl"
ENGLISH, GERMAN = "this is a text in English about the weather", "das ist ein Text auf Deutsch über das Wetter"

CASES = {  # arguments, replies that follow the instruction, replies that do not
    "keywords:existence": ({"keywords": ["cat", "Owl"]}, ["The CAT and the owl"], ["the cat"]),
    "keywords:frequency": (
        {"keyword": "owl", "frequency": 2, "relation": "at least"},
        ["owl, Owl"],
        ["owl"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["key"]}, ["monkeys"], ["the Key."]),
    "keywords:letter_frequency": (
        {"letter": "l", "let_frequency": 3, "let_relation": "less than"},
        ["hello"],
        ["Lily hello"],
    ),
    "language:response_language": ({"language": "de"}, [GERMAN], [ENGLISH]),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"},
        ['One. "Two!" Three?'],
        ["One 1.5 two. Three"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb", "a *** b ***"],
        ["a\n\nb", "a *** *** b", "a"],
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, ["one two"], ["a, b c"]),
    "length_constraints:nth_paragraph_first_word": (
        {"first_word": "owl", "num_paragraphs": 2, "nth_paragraph": 2},
        ["a\n\n'Owl, b"],
        ["a\n\nb owl", "a\n\nowl\n\nc", "owl"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name], [place]"], ["[name]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["bye\nP.S. owl", "p. s. owl"], ["PS owl"]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n- b", "x\n  * a\n* b"], ["* a", "**a**\n* b"]),
    "detectable_format:constrained_response": ({}, ["Well. My answer is no."], ["no"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "**a**", "* *  *b"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "section 1 section 2"],
    ),
    "detectable_format:json_format": ({}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["a: 1", "[" * 5000]),
    "detectable_format:title": ({}, ["<<An owl>>\nhoo"], ["<An owl>", "<< >>"]),
    "combination:two_responses": ({}, ["a\n******\nb", "******a******b******"], ["a", "a******a", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, ["say it. Owl"], ["Owl. Say it."]),
    "startend:end_checker": ({"end_phrase": "The end."}, ['so: "the end."'], ["The end. Owl"]),
    "startend:quotation": ({}, ['"owl"'], ['"owl', '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["The OWL and the CAT"],
        ["The OWL"],
    ),
    "change_case:english_capital": ({}, [ENGLISH.upper()], [ENGLISH]),
    "change_case:english_lowercase": ({}, [ENGLISH.lower()], [ENGLISH, GERMAN.lower()]),
    "punctuation:no_comma": ({}, ["owl and cat"], ["owl, cat"]),
}


def row(*names, arguments=None):
    given = [CASES[name][0] for name in names] if arguments is None else arguments
    return Row("s", 0, (Message("user", "?"),), (), None, None, {"instruction_id_list": list(names), "kwargs": given})


def test_every_instruction_is_told_from_its_neglect():
    assert CASES.keys() == INSTRUCTIONS.keys()
    assert len(CASES) == 25
    jobs = [(name, reply, sign) for name, case in CASES.items() for sign in (1, 2) for reply in case[sign]]
    verdicts = judge([("ifeval", row(name), reply) for name, reply, _ in jobs])
    wrong = [
        (name, reply[:40])
        for (name, reply, sign), verdict in zip(jobs, verdicts, strict=True)
        if verdict.figures["strict"] != (sign == 1)
    ]
    assert wrong == []
    nothing = judge([("ifeval", row(name), " \n") for name in CASES])
    assert not any(verdict.figures["loose"] for verdict in nothing), "an empty reply follows no instruction"


def test_loose_forgives_the_first_line_the_last_and_asterisks():
    reply = 'Sure:\n"**owl**"\nHope that helps'
    assert set(loosened(reply)) >= {'"owl"', '"**owl**"', '"owl"\nHope that helps'}
    both = row("startend:quotation", "punctuation:no_comma")
    assert check("ifeval", both, reply) == {"strict": 0.0, "loose": 1.0, "strict_share": 0.5, "loose_share": 1.0}


def test_rows_that_cannot_be_judged():
    bad = [
        row("punctuation:no_comma", arguments=[]),
        row("punctuation:no_dots", arguments=[{}]),
        row("keywords:existence", arguments=[{}]),
    ]
    verdicts = judge([("ifeval", one, "owl") for one in bad])
    assert [verdict.figures for verdict in verdicts] == [{}, {}, {}]
    assert "keywords" in verdicts[2].reason
    (problem,) = unjudged("data.sources.a", bad, "ifeval", {})  # before a first step has a reply to judge
    assert "3 of 3 rows" in problem.why


@pytest.mark.skipif(not REAL.exists(), reason="the real rows lie beside a working copy, not in the repository")
def test_every_real_row_can_be_judged():
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    rows = [row(*one["instruction_id_list"], arguments=one["kwargs"]) for one in rows]
    verdicts = judge([("ifeval", one, "An answer, plain and short.") for one in rows])
    assert all(verdict.figures and verdict.reason is None for verdict in verdicts)
    assert 0.05 < sum(verdict.figures["loose_share"] for verdict in verdicts) / len(verdicts) < 0.4
