"""Valid files of rows and configurations, and what can become of them on the way: bits, halves, other encodings."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [{"prompt": f"say {n}", "completion": f"well, {n}", "answer": str(n)} for n in range(6)],
    "messages": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(6)
    ],
    "pairs": [
        {"prompt": f"q {n}", "chosen": "yes", "rejected": "no", "score_chosen": 4.5, "score_rejected": n}
        for n in range(6)
    ],
    "labels": [{"prompt": f"q {n}", "completion": "a", "label": bool(n % 2), "soft_label": 0.5} for n in range(6)],
    "scores": [
        {"prompt": f"q {n // 2}", "completion": f"a {n}", "score": n / 6, "score_min": 0, "score_max": 1}
        for n in range(6)
    ],
    "helpsteer": [
        {"prompt": f"q {n}", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 2} for n in range(6)
    ],
    "ultrafeedback": [
        {"instruction": f"q {n}", "completions": [{"response": "a", "overall_score": 5}, {"response": "b"}]}
        for n in range(6)
    ],
    "negatives": [
        {
            "prompt": f"q {n}",
            "response": "a",
            "negatives": ["b", "c"],
            "sampled_by": ["m", "n"],
            "negative_log_probs": [-1.5, -2.0],
        }
        for n in range(6)
    ],
}

VALUES = (
    "1e999",
    "-1e999",
    "NaN",
    "-Infinity",
    "1" * 400,
    "1" * 5000,
    "-0",
    "1.7976931348623157e308",
    "5e-324",
    "true",
    "null",
    "[]",
    "{}",
    '""',
    '" "',
    '"\\ud800"',
    '"\\u0000"',
    '"\u202e"',
    '"' + "x" * 20_000 + '"',
    "[" * 400 + "]" * 400,
    '{"a":' * 300 + "1" + "}" * 300,
    '[{"role": "assistant", "content": "a"}]',
    '[{"role": ["user"], "content": {"a": 1}}]',
    '[{"role": "user", "content": [{"text": 1}]}]',
    '{"content": "x"}',
    "0.1",
    "2",
    '"0.5"',
    '["a", 1, null]',
)
"""JSON values that no field expects."""

BYTES = (
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b",",
    b"\xef\xbb\xbf",
    b"\x1a",
    b"\xc3",
)


def flipped(draw: random.Random, raw: bytes) -> bytes:
    made = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        made[draw.randrange(len(made))] = draw.randrange(256)
    return bytes(made)


def cut(draw: random.Random, raw: bytes) -> bytes:
    return raw[: draw.randrange(len(raw))]


def put_in(draw: random.Random, raw: bytes) -> bytes:
    place = draw.randrange(len(raw))
    return raw[:place] + draw.choice(BYTES) * draw.randint(1, 3) + raw[place:]


def left_out(draw: random.Random, raw: bytes) -> bytes:
    start = draw.randrange(len(raw))
    return raw[:start] + raw[start + draw.randint(1, 40) :]


def repeated(draw: random.Random, raw: bytes) -> bytes:
    start = draw.randrange(len(raw))
    piece = raw[start : start + draw.randint(1, 60)]
    return raw[:start] + piece * draw.randint(2, 200) + raw[start:]


def in_utf16(draw: random.Random, raw: bytes) -> bytes:
    return raw.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))


def old_line_ends(draw: random.Random, raw: bytes) -> bytes:
    return raw.replace(b"\n", draw.choice([b"\r", b"\r\n", b"\n\r"]))


def shuffled(draw: random.Random, raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    draw.shuffle(lines)
    return b"".join(lines)


ANY_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flipped,
    cut,
    put_in,
    left_out,
    repeated,
    in_utf16,
    old_line_ends,
    shuffled,
)


def other_values(draw: random.Random, rows: list[dict[str, Any]]) -> str:
    """JSON Lines in which some values are others, some keys are twice, are gone, or are new."""
    lines = []
    for row in rows:
        items = [(json.dumps(key), json.dumps(value)) for key, value in row.items()]
        if draw.random() < 0.7:
            place = draw.randrange(len(items))
            key, value = items[place]
            change = draw.randrange(4)
            if change == 0:
                items[place] = key, draw.choice(VALUES)
            elif change == 1:
                items.append((key, draw.choice(VALUES)))
            elif change == 2:
                del items[place]
            else:
                items.append(
                    (json.dumps(draw.choice(["", "\x00", "é", "label", "score", "messages", "__proto__"])), value)
                )
        lines.append("{" + ", ".join(f"{key}: {value}" for key, value in items) + "}")
    return "\n".join(lines) + "\n"


def jsonl(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    text = other_values(draw, rows) if draw.random() < 0.5 else "".join(json.dumps(row) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


def json_array(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    lines = jsonl(draw, rows).decode("utf-8").splitlines()
    return ("[" + ",\n".join(lines) + "]").encode()


def csv_file(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], quoting=draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    writer.writeheader()
    for row in rows:
        some = {
            key: draw.choice(["", "nan", "1e999", "x", "\x00", "true"]) if draw.random() < 0.1 else value
            for key, value in row.items()
        }
        writer.writerow(some)
    return text.getvalue().encode()


def parquet(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    compression = draw.choice(["none", "snappy", "zstd"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression=compression)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[random.Random, list[dict[str, Any]]], bytes]] = {
    "jsonl": jsonl,
    "json": json_array,
    "csv": csv_file,
    "parquet": parquet,
}


def case(number: int, suffix: str) -> bytes:
    """The file of this number, which is the same on every machine."""
    draw = random.Random(f"{suffix} {number}")
    raw = FILES[suffix](draw, ROWS[draw.choice(sorted(ROWS))])
    for _ in range(draw.choice([0, 1, 1, 1, 2, 5]) if suffix != "jsonl" else draw.choice([0, 0, 1, 2])):
        if raw:
            raw = draw.choice(ANY_BYTES)(draw, raw)
    return raw


SETTINGS = """\
# @package _global_
defaults:
  - override /objective: dpo
  - override /data: pairs
seed: 3
train:
  steps: 5
  batch_size: 8
optim: {lr: 1.0e-3, betas: [0.9, 0.95]}
data:
  ratio: null
  sources:
    mine:
      path: rows.jsonl
      columns: {prompt: question}
tracking:
  tags: [a, b]
stages: {}
"""

WORDS = (
    ": ",
    "- ",
    "&a ",
    "*a",
    "!!python/object:os.system ",
    "${seed}",
    "${oc.env:HOME}",
    "${",
    "${train.steps}",
    "???",
    "<<: *a",
    "{",
    "]",
    "|\n",
    "\t",
    "'",
    "%YAML 9\n",
    "---\n",
    "...",
    "null",
    ".nan",
    "1e999",
    "0x7f",
    "1_000",
    "yes",
    "~",
    "\u202e",
    "\x00",
    "\x85",
    "[" * 300,
    "{a: " * 200,
    "9" * 5000,
    "2001-01-01",
    "_target_: os.system",
    "defaults: [x]",
    "hydra: {}",
)


def configuration(number: int) -> bytes:
    draw = random.Random(f"configuration {number}")
    text = SETTINGS
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        if draw.random() < 0.6:
            text = text[:place] + draw.choice(WORDS) + text[place + draw.choice([0, 0, 3]) :]
        else:
            text = shuffled(draw, text.encode()).decode() if draw.random() < 0.3 else text[:place] + text[place + 5 :]
    raw = text.encode("utf-8", "surrogatepass")
    return draw.choice(ANY_BYTES)(draw, raw) if draw.random() < 0.4 else raw


class Planted:
    """What a pickle can do: leave a file behind when it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)
