"""IFEval: the 25 verifiable instructions of arXiv 2311.07911, strict and loose.

A table from an instruction's identifier to its check, which maps a reply and the instruction's arguments to whether it
is followed. Two differ from the published code, which asks NLTK: sentences end at `.`, `!` or `?` before white space,
and words are runs of letters and digits with hyphens and full stops inside. The language is langdetect's guess, with
its seed fixed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from uft.data.rows import Row
from uft.rewards.base import Checker, Figures, Unjudged, answered, fact

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]

RELATIONS: dict[str, Callable[[int, int], bool]] = {"less than": int.__lt__, "at least": int.__ge__}


def _as_many(count: int, arguments: Arguments, wanted: str, relation: str = "relation") -> bool:
    return RELATIONS[arguments[relation]](count, int(arguments[wanted]))


def _occurrences(text: str, keyword: str) -> int:
    return text.lower().count(keyword.lower())


def _language(text: str) -> str | None:
    """The language's code; None where the text says nothing of it, e.g. has no letters."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None


def _sentences(text: str) -> int:
    return sum(re.search(r"\w", one) is not None for one in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()))


def _filled(parts: list[str]) -> int | None:
    """How many parts say something; None where an empty one stands between others."""
    if not all(part.strip() for part in parts[1:-1]):
        return None
    return sum(bool(part.strip()) for part in parts)


def _nth_paragraph_first_word(reply: str, arguments: Arguments) -> bool:
    paragraphs, nth = reply.split("\n\n"), int(arguments["nth_paragraph"])
    filled = sum(bool(one.strip()) for one in paragraphs)
    if filled != int(arguments["num_paragraphs"]) or nth > len(paragraphs) or not paragraphs[nth - 1].strip():
        return False
    first = paragraphs[nth - 1].split()[0].lstrip("'\"").lower()
    word = re.match(r"[^.,?!'\"]*", first)
    return word is not None and word[0] == arguments["first_word"].lower()


def _postscript(reply: str, arguments: Arguments) -> bool:
    marker = str(arguments["postscript_marker"]).lower()
    spaced = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s"}  # as people write them
    return re.search(spaced.get(marker, re.escape(marker)), reply.lower()) is not None


def _is_json(reply: str, arguments: Arguments) -> bool:
    text = re.sub(r"\A```(?:json)?", "", reply.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(reply: str, arguments: Arguments) -> bool:
    parts = reply.split("******")
    said = [part.strip() for part in parts if part.strip()]
    return _filled(parts) == 2 and said[0] != said[1]


INSTRUCTIONS: dict[str, Check] = {
    "keywords:existence": lambda reply, a: all(_occurrences(reply, keyword) for keyword in a["keywords"]),
    "keywords:frequency": lambda reply, a: _as_many(_occurrences(reply, a["keyword"].strip()), a, "frequency"),
    "keywords:forbidden_words": lambda reply, a: (
        not any(re.search(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE) for word in a["forbidden_words"])
    ),
    "keywords:letter_frequency": lambda reply, a: _as_many(
        _occurrences(reply, a["letter"]), a, "let_frequency", "let_relation"
    ),
    "language:response_language": lambda reply, a: _language(reply) in (a["language"], None),
    "length_constraints:number_sentences": lambda reply, a: _as_many(_sentences(reply), a, "num_sentences"),
    "length_constraints:number_paragraphs": lambda reply, a: (
        _filled(re.split(r"\s?\*\*\*\s?", reply)) == int(a["num_paragraphs"])
    ),
    "length_constraints:number_words": lambda reply, a: _as_many(len(re.findall(r"\w+", reply)), a, "num_words"),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda reply, a: (
        len(re.findall(r"\[[^\n\]]*\]", reply)) >= int(a["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda reply, a: (
        len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-).*$", reply, re.MULTILINE)) == int(a["num_bullets"])
    ),
    "detectable_format:constrained_response": lambda reply, a: any(
        f"My answer is {word}." in reply for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": lambda reply, a: (
        sum(bool(text.strip()) for mark in (r"\*", r"\*\*") for text in re.findall(rf"{mark}([^\n*]*){mark}", reply))
        >= int(a["num_highlights"])
    ),
    "detectable_format:multiple_sections": lambda reply, a: (
        len(re.findall(rf"{re.escape(a['section_spliter'].strip())}\s?\d+", reply)) >= int(a["num_sections"])
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda reply, a: any(
        one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", reply)
    ),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda reply, a: (
        reply.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": lambda reply, a: reply.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    "startend:quotation": lambda reply, a: re.fullmatch(r'".*"', reply.strip(), re.DOTALL) is not None,
    "change_case:capital_word_frequency": lambda reply, a: _as_many(
        sum(map(str.isupper, re.findall(r"\w+(?:[-.]\w+)*", reply))), a, "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda reply, a: reply.isupper() and _language(reply) in ("en", None),
    "change_case:english_lowercase": lambda reply, a: reply.islower() and _language(reply) in ("en", None),
    "punctuation:no_comma": lambda reply, a: "," not in reply,
}
"""By the identifier that rows give an instruction."""


def loosened(reply: str) -> Iterator[str]:
    """The reply, and without its first, its last, or both of these lines; each also without asterisks."""
    lines = reply.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(kept).strip()
        yield text
        yield text.replace("*", "")


@dataclass(frozen=True)
class IFEval(Checker):
    """`strict`: every instruction of the row is followed; `loose`: some loosened form of the reply follows it.

    `strict_share` and `loose_share`: the share of the row's instructions. Rows as those of google/IFEval.
    """

    figures: ClassVar[tuple[str, ...]] = ("strict", "loose", "strict_share", "loose_share")
    columns: ClassVar[tuple[str, ...]] = ("instruction_id_list", "kwargs")
    packages: ClassVar[tuple[str, ...]] = ("langdetect",)
    isolated: ClassVar[bool] = True

    def judge(self, row: Row, reply: str) -> Figures:
        names, given = fact(row, "instruction_id_list"), fact(row, "kwargs")
        if not names or len(names) != len(given):
            raise Unjudged("the row's instruction_id_list and kwargs are no lists of one length")
        if unknown := [name for name in names if str(name) not in INSTRUCTIONS]:
            raise Unjudged(f"IFEval has no instruction {unknown[0]}")
        strict, loose, reply = 0, 0, answered(reply)
        for name, arguments in zip(names, given, strict=True):

            def follows(text: str, check: Check = INSTRUCTIONS[name], arguments: Arguments = arguments) -> bool:
                return bool(text.strip()) and check(text, arguments or {})

            try:
                strict += follows(reply)
                loose += any(map(follows, loosened(reply)))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise Unjudged(f"the arguments of {name} are not as they should be: {error!r}") from error
        shares = {"strict_share": strict / len(names), "loose_share": loose / len(names)}
        return {"strict": float(strict == len(names)), "loose": float(loose == len(names)), **shares}
