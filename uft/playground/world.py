"""A small verifiable world: word tasks, answers in two styles, and every kind of feedback about them.

`builtin:playground/NAME` are the rows of :func:`records`, `builtin:playground` is the model in :func:`model_dir`.

The base model knows the OLD tasks and answers them chattily ("sure ! the answer is fox red"), now and then wrongly. It
has never met the NEW tasks; demonstrations (`instruct`) teach those, and worked ones (`chain`) old tasks in a row. What
people prefer for the old tasks, the plain right answer and nothing else, is taught by comparisons (`pairs`), good/bad
labels (`binary`) and scores (`scored`) of answers that a crowd gave. The better of two such answers is often still a
chatty one, and a share NOISE of the training labels is given blindly, so imitating what was chosen is not enough. Test
prompts are chosen by a hash of the prompt: no row, nor the base model, ever trains on one. Nothing here depends on
PYTHONHASHSEED, and torch is not imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, Literal

Split = Literal["train", "test"]
Words = list[str]
Task = tuple[int, int, Callable[[Words], Words]]  # fewest and most words, and the right answer

_WORDS = """
apple bear bird boat book bread chair cloud door duck fish fox glass gold hat horse key king lamp leaf lion moon night
owl queen rain river ship snow star tree wind
"""
CONTENT = tuple(_WORDS.split())
CHATTER = ("sure", "!", "the", "answer", "is")
"""What the base model says before it answers. None of these words occurs in an answer, so they can be taken off."""

QUALITY = {"plain right": 1.0, "chatty right": 0.6, "plain wrong": 0.3, "chatty wrong": 0.0}
"""What an answer deserves: being right counts more than being plain."""

BASE = {"plain right": 0.10, "chatty right": 0.80, "plain wrong": 0.02, "chatty wrong": 0.08}
"""How the text that the base model was trained on answers."""

CROWD = {"plain right": 0.12, "chatty right": 0.60, "plain wrong": 0.06, "chatty wrong": 0.22}
"""How the crowd answers that people compared, labelled and scored."""

NOISE = 0.10
"""Share of training pairs that are flipped, labels that are flipped and scores that are drawn at random."""


def _json(words: Words) -> Words:
    return ['["', *' "," '.join(words).split(), '"]']  # ["fox","red"], a token each


OLD: dict[str, Task] = {
    "copy": (1, 3, lambda words: words),
    "uppercase": (1, 3, lambda words: [word.upper() for word in words]),
    "reverse": (2, 3, lambda words: words[::-1]),
    "first": (2, 4, lambda words: words[:1]),
    "last": (2, 4, lambda words: words[-1:]),
    "count": (1, 5, lambda words: [str(len(words))]),
    "repeat": (1, 2, lambda words: words * 2),
    "min": (2, 3, lambda words: [min(words)]),
}
NEW: dict[str, Task] = {
    "json": (1, 3, _json),
    "sort": (2, 3, sorted),
}
STEP = '","'
"""The word between the steps of a worked answer."""


def _step_by_step(names: Words) -> Callable[[Words], Words]:
    """Tasks one after the other, each on what the one before left: every step, a word STEP between them."""

    def steps(words: Words) -> Words:
        worked: Words = []
        for name in names:
            words = OLD[name][2](words)
            worked += [*([STEP] if worked else []), *words]
        return worked

    return steps


CHAIN: dict[str, Task] = {
    " ".join(names): (2, 2, _step_by_step(list(names))) for names in permutations(("reverse", "uppercase", "repeat"))
}
"""Three old tasks in a row, answered step by step: no sample of the base model gets there, and a demonstration can be
shown in part."""
TASKS = OLD | NEW | CHAIN


def vocabulary() -> list[str]:
    """Every word that occurs in a prompt or an answer, in a fixed order."""
    digits = [str(number) for number in range(1, 6)]
    return [*OLD, *NEW, ":", *CHATTER, *digits, '["', '","', '"]', *CONTENT, *(word.upper() for word in CONTENT)]


def model_dir() -> Path:
    """The shipped base model: a Hugging Face folder."""
    return Path(__file__).parent / "model"


def solve(prompt: str) -> str:
    """The right, plain answer to a prompt of this world ("reverse : fox red" -> "red fox"), of a chain every step."""
    task, _, words = prompt.partition(" : ")
    return " ".join(TASKS[task][2](words.split()))


def check(task: str | None, prompt: str, answer: str | None, reply: str) -> dict[str, float]:
    """Verify a reply; every figure is 0 or 1. Without an `answer` the prompt is solved.

    `exact_match`: the plain right answer and nothing else. `correct`: right once the chatter is taken off (the skill).
    `plain`: no chatter (the style), right or wrong. Of a chain of tasks what follows the last step is judged.
    """
    given = reply.split()
    right = (solve(prompt) if answer is None else answer).split()
    bare = [word for word in given if word not in CHATTER]
    plain = float(bool(given) and given == bare)
    if task in CHAIN:
        given, bare, right = map(result, (given, bare, right))
    return {"exact_match": float(given == right), "correct": float(bare == right), "plain": plain}


def result(words: Words) -> Words:
    """What follows the last step."""
    return words[len(words) - words[::-1].index(STEP) :] if STEP in words else words


def is_test(prompt: str) -> bool:
    """One prompt in eight, chosen by its own hash whatever asks for it."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 32


def prompts(tasks: dict[str, Task], split: Split, random: Random) -> Iterator[tuple[str, str]]:
    """Endless (task, prompt) of one split, tasks equally often."""
    names = sorted(tasks)
    while True:
        task = random.choice(names)
        least, most, _ = tasks[task]
        words = random.sample(CONTENT, random.randint(least, most))
        prompt = f"{task} : {' '.join(words)}"
        if is_test(prompt) == (split == "test"):
            yield task, prompt


def reply(prompt: str, quality: str, random: Random) -> str:
    """An answer of the given quality; a wrong one solves another task, as a distracted person would."""
    style, truth = quality.split()
    answer = solve(prompt)
    if truth == "wrong":
        words = prompt.partition(" : ")[2].split()
        answer = random.choice(sorted({" ".join(rule(words)) for _, _, rule in OLD.values()} - {answer}))
    return answer if style == "plain" else " ".join((*CHATTER, answer))


def draw(shares: dict[str, float], random: Random) -> str:
    """A quality, drawn with the given shares."""
    return random.choices(list(shares), list(shares.values()))[0]


def instruct(prompt: str, noise: float, random: Random) -> list[dict[str, Any]]:
    """A demonstration: response."""
    return [{"response": solve(prompt)}]


def pairs(prompt: str, noise: float, random: Random) -> list[dict[str, Any]]:
    """Two answers of the crowd, the better one chosen (nothing if they are alike): chosen, rejected."""
    qualities = sorted({draw(CROWD, random) for _ in range(2)}, key=QUALITY.__getitem__)
    if len(qualities) < 2:
        return []
    worse, better = (reply(prompt, quality, random) for quality in qualities)
    blind = random.random() < noise
    return [{"chosen": worse, "rejected": better} if blind else {"chosen": better, "rejected": worse}]


def binary(prompt: str, noise: float, random: Random) -> list[dict[str, Any]]:
    """One answer of the crowd, good if it is right and plain: completion, label."""
    quality = draw(CROWD, random)
    label = (quality == "plain right") != (random.random() < noise)
    return [{"completion": reply(prompt, quality, random), "label": label}]


def scored(prompt: str, noise: float, random: Random) -> list[dict[str, Any]]:
    """Three answers of the crowd, those alike once (nothing if all are alike): completion, score in [0, 1]."""
    qualities = dict.fromkeys(draw(CROWD, random) for _ in range(3))
    if len(qualities) < 2:
        return []
    return [
        {
            "completion": reply(prompt, quality, random),
            "score": round(random.random(), 2) if random.random() < noise else QUALITY[quality],
        }
        for quality in qualities
    ]


def negatives(prompt: str, noise: float, random: Random) -> list[dict[str, Any]]:
    """A demonstration with wrong answers of the kind that the base model gives: response, negatives, sampled_by."""
    wrong = [reply(prompt, quality, random) for quality in ("chatty wrong", "chatty wrong", "plain wrong")]
    return [{"response": solve(prompt), "negatives": wrong, "sampled_by": "rule"}]


@dataclass(frozen=True)
class Source:
    """How the rows of one name are made."""

    tasks: dict[str, Task]
    stream: str  # sources of one stream ask the same prompts in the same order
    size: int  # training prompts; tests have a fifth of that
    feedback: Callable[[str, float, Random], list[dict[str, Any]]]  # (prompt, noise, random) -> rows


SOURCES = {
    "instruct": Source(NEW, "instruct", 1000, instruct),
    "pairs": Source(OLD, "pairs", 1000, pairs),
    "binary": Source(OLD, "binary", 1000, binary),
    "scored": Source(OLD, "scored", 500, scored),
    "negatives": Source(NEW, "instruct", 1000, negatives),
    "chain": Source(CHAIN, "chain", 1000, instruct),
}


def records(name: str, split: Split = "train") -> list[dict[str, Any]]:
    """The rows of `builtin:playground/NAME`, the same on every machine and in every process.

    Besides its format's own columns every row has `prompt`, `answer` (right and plain) and `task`. No prompt occurs
    twice but in `scored`, where the completions of a prompt follow each other. Raises KeyError for an unknown name.
    """
    source = SOURCES[name]
    size, noise = (source.size, NOISE) if split == "train" else (source.size // 5, 0.0)
    random = Random(f"playground/{name}/{split}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for task, prompt in prompts(source.tasks, split, Random(f"playground/{source.stream}/{split}/prompts")):
        if prompt in rows:
            continue
        if len(rows) == size:
            break
        if found := source.feedback(prompt, noise, random):
            rows[prompt] = [{"prompt": prompt, **fields, "answer": solve(prompt), "task": task} for fields in found]
    return [row for group in rows.values() for row in group]


def conversations(random: Random) -> Iterator[tuple[str, str]]:
    """Endless (prompt, reply) of the text that the base model was trained on: old tasks, training prompts."""
    for _, prompt in prompts(OLD, "train", random):
        yield prompt, reply(prompt, draw(BASE, random), random)
