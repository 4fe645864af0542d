"""IFEval: the 25 verifiable instructions of arXiv 2311.07911, strict and loose.

One function each, from a reply and the instruction's arguments to whether it is followed. Two differ from the
published code, which asks NLTK: sentences end at `.`, `!` or `?` before white space, and words are runs of letters and
digits with hyphens and full stops inside. The language is langdetect's guess, with its seed fixed.
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


# keywords


def existence(reply: str, arguments: Arguments) -> bool:
    return all(_occurrences(reply, keyword) for keyword in arguments["keywords"])


def frequency(reply: str, arguments: Arguments) -> bool:
    return _as_many(_occurrences(reply, arguments["keyword"].strip()), arguments, "frequency")


def forbidden_words(reply: str, arguments: Arguments) -> bool:
    words = (rf"\b{re.escape(word)}\b" for word in arguments["forbidden_words"])
    return not any(re.search(word, reply, re.IGNORECASE) for word in words)


def letter_frequency(reply: str, arguments: Arguments) -> bool:
    return _as_many(_occurrences(reply, arguments["letter"]), arguments, "let_frequency", "let_relation")


# language and case


def _language(text: str) -> str | None:
    """The language's code; None where the text says nothing of it, e.g. has no letters."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None


def response_language(reply: str, arguments: Arguments) -> bool:
    return _language(reply) in (arguments["language"], None)


def english_capital(reply: str, arguments: Arguments) -> bool:
    return reply.isupper() and _language(reply) in ("en", None)


def english_lowercase(reply: str, arguments: Arguments) -> bool:
    return reply.islower() and _language(reply) in ("en", None)


def capital_word_frequency(reply: str, arguments: Arguments) -> bool:
    capitals = sum(word.isupper() for word in re.findall(r"\w+(?:[-.]\w+)*", reply))
    return _as_many(capitals, arguments, "capital_frequency", "capital_relation")


# lengths


def number_sentences(reply: str, arguments: Arguments) -> bool:
    sentences = [one for one in re.split(r"(?<=[.!?])[\"')\]]*\s+", reply.strip()) if re.search(r"\w", one)]
    return _as_many(len(sentences), arguments, "num_sentences")


def number_words(reply: str, arguments: Arguments) -> bool:
    return _as_many(len(re.findall(r"\w+", reply)), arguments, "num_words")


def _filled(parts: list[str]) -> int | None:
    """How many parts say something; None where an empty one stands between others."""
    if not all(part.strip() for part in parts[1:-1]):
        return None
    return sum(bool(part.strip()) for part in parts)


def number_paragraphs(reply: str, arguments: Arguments) -> bool:
    return _filled(re.split(r"\s?\*\*\*\s?", reply)) == int(arguments["num_paragraphs"])


def nth_paragraph_first_word(reply: str, arguments: Arguments) -> bool:
    paragraphs, nth = reply.split("\n\n"), int(arguments["nth_paragraph"])
    filled = sum(bool(one.strip()) for one in paragraphs)
    if filled != int(arguments["num_paragraphs"]) or nth > len(paragraphs) or not paragraphs[nth - 1].strip():
        return False
    first = paragraphs[nth - 1].split()[0].lstrip("'\"").lower()
    word = re.match(r"[^.,?!'\"]*", first)
    return word is not None and word[0] == arguments["first_word"].lower()


# detectable content and format


def number_placeholders(reply: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[[^\n\]]*\]", reply)) >= int(arguments["num_placeholders"])


def postscript(reply: str, arguments: Arguments) -> bool:
    marker = str(arguments["postscript_marker"]).lower()
    spaced = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s"}  # as people write them
    return re.search(spaced.get(marker, re.escape(marker)), reply.lower()) is not None


def number_bullet_lists(reply: str, arguments: Arguments) -> bool:
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-).*$", reply, re.MULTILINE)) == int(arguments["num_bullets"])


def constrained_response(reply: str, arguments: Arguments) -> bool:
    return any(f"My answer is {word}." in reply for word in ("yes", "no", "maybe"))


def number_highlighted_sections(reply: str, arguments: Arguments) -> bool:
    marked = re.findall(r"\*([^\n*]*)\*", reply) + re.findall(r"\*\*([^\n*]*)\*\*", reply)
    return sum(bool(text.strip()) for text in marked) >= int(arguments["num_highlights"])


def multiple_sections(reply: str, arguments: Arguments) -> bool:
    sections = re.findall(rf"{re.escape(arguments['section_spliter'].strip())}\s?\d+", reply)
    return len(sections) >= int(arguments["num_sections"])


def json_format(reply: str, arguments: Arguments) -> bool:
    text = re.sub(r"\A```(?:json)?", "", reply.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(reply: str, arguments: Arguments) -> bool:
    return any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", reply))


# combinations, beginning and end, punctuation


def two_responses(reply: str, arguments: Arguments) -> bool:
    parts = reply.split("******")
    said = [part.strip() for part in parts if part.strip()]
    return _filled(parts) == 2 and said[0] != said[1]


def repeat_prompt(reply: str, arguments: Arguments) -> bool:
    return reply.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def end_checker(reply: str, arguments: Arguments) -> bool:
    return reply.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def quotation(reply: str, arguments: Arguments) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(reply: str, arguments: Arguments) -> bool:
    return "," not in reply


INSTRUCTIONS: dict[str, Check] = {
    f"{group}:{check.__name__}": check
    for group, checks in {
        "keywords": (existence, frequency, forbidden_words, letter_frequency),
        "language": (response_language,),
        "length_constraints": (number_sentences, number_paragraphs, number_words, nth_paragraph_first_word),
        "detectable_content": (number_placeholders, postscript),
        "detectable_format": (
            number_bullet_lists,
            constrained_response,
            number_highlighted_sections,
            multiple_sections,
            json_format,
            title,
        ),
        "combination": (two_responses, repeat_prompt),
        "startend": (end_checker, quotation),
        "change_case": (capital_word_frequency, english_capital, english_lowercase),
        "punctuation": (no_comma,),
    }.items()
    for check in checks
}


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
