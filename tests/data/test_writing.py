"""What is written is read back as it was: random rows of every kind, with nasty texts and numbers."""

import json
import random

import pytest

from uft.config.schema import data_settings
from uft.data.records import is_rows_file, to_records, write_rows
from uft.data.rows import Completion, Kind, Message, Row, content_digest
from uft.data.sources import load_sources

PIECES = ["a", " ", "\n", '"', "\\", "é", "\u2028", "😀", "</s>", "{{ x }}", "null", "1.0", "#### 7", "\t", "\u0000"]
ROLES = ("user", "assistant")


class Rows:
    """Random rows as the reader makes them: what it refuses (blank texts, two replies running) never comes."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def maybe(self, make):
        return make() if self.random.random() < 0.5 else None

    def text(self):
        return "x" + "".join(self.random.choices(PIECES, k=self.random.randint(0, 8)))

    def turns(self, first, count):
        return [Message(ROLES[(ROLES.index(first) + n) % 2], self.text()) for n in range(count)]

    def prompt(self):
        system = [Message("system", self.text())] if self.random.random() < 0.3 else []
        return (*system, *self.turns("user", self.random.choice([0, 0, 2])))

    def completion(self, annotated=True, **feedback):
        numbers = {"baseline_logp": self.maybe(lambda: -self.random.expovariate(1))} if annotated else {}
        if "score" in feedback:
            numbers["soft_label"] = self.maybe(self.random.random)
        known = {name: value for name, value in numbers.items() if value is not None}
        return Completion(tuple(self.turns("assistant", self.random.choice([1, 1, 3]))), **feedback, annotations=known)

    def demonstration(self):
        return [self.completion()]

    def binary(self):
        return [self.completion(label=self.random.random() < 0.5)]

    def scored(self):
        return [self.completion(score=self.random.random()) for _ in range(self.random.randint(1, 4))]

    def preference(self):
        pair = [self.completion(preferred=True), self.completion(preferred=False)]
        likely = self.maybe(self.random.random)
        for completion, p in zip(pair, (likely, None if likely is None else 1 - likely), strict=True):
            if p is not None:
                completion.annotations["soft_label"] = p
            if rating := self.maybe(lambda: self.random.uniform(-5, 10)):
                completion.annotations["score"] = rating
        return pair

    def negatives(self):
        known = self.random.random() < 0.5
        sampled = [
            self.completion(sampled_by=self.text(), log_prob=-self.random.expovariate(0.1) if known else None)
            for _ in range(self.random.randint(1, 3))
        ]
        return [self.completion(), *sampled]

    def row(self, kind, index):
        completions = () if kind is Kind.PROMPT else tuple(getattr(self, kind.value)())
        prompt = (*self.prompt(), Message("user", f"{index}"))  # scored completions of one prompt are one row
        return Row("mine", index, prompt, completions, self.maybe(self.text), self.maybe(self.text))


def read(path, **source):
    return load_sources(data_settings({"name": "d", "sources": {"mine": {"path": str(path), **source}}}))[0].rows


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.ROLLOUT])  # those are in no file
@pytest.mark.parametrize("seed", range(4))
def test_reading_what_was_written_gives_the_rows(kind, seed, tmp_path):
    source = Rows(seed)
    rows = tuple(source.row(kind, index) for index in range(60))
    assert {row.kind for row in rows} == {kind}
    write_rows(tmp_path / "rows.jsonl", rows)
    found = read(tmp_path / "rows.jsonl")
    assert found == rows
    assert content_digest(found) == content_digest(rows)
    again = tmp_path / "again.jsonl"
    write_rows(again, found)
    assert again.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["instruct", "pairs", "binary", "scored", "negatives"])
def test_so_do_the_playground_s_rows(name, tmp_path):
    (source,) = load_sources(
        data_settings({"name": "d", "sources": {"mine": {"path": f"builtin:playground/{name}", "limit": 50}}})
    )
    kind = {"instruct": "demonstration", "pairs": "preference"}.get(name, name)
    assert {kind.value for kind in source.kinds} == {kind}
    assert all(row.answer and row.task for row in source.rows)
    write_rows(tmp_path / "rows.jsonl", source.rows)
    assert read(tmp_path / "rows.jsonl", checker="playground") == source.rows


def test_columns_are_those_that_others_read_too():
    row = Row("mine", 3, (Message("user", "q"),), (Completion((Message("assistant", "a"),)),), answer="a")
    assert to_records(row) == [{"row": "mine:3", "prompt": "q", "completion": "a", "answer": "a"}]
    chosen, rejected = (
        Completion((Message("assistant", text),), preferred=text == "a", annotations={"soft_label": p})
        for text, p in (("a", 0.75), ("b", 0.25))
    )
    line = {"row": "mine:4", "prompt": "q", "chosen": "a", "rejected": "b", "soft_label": 0.75}
    assert to_records(Row("mine", 4, row.prompt, (chosen, rejected))) == [line]


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path, row = tmp_path / "new" / "rows.jsonl", Rows(0).row(Kind.BINARY, 0)
    write_rows(path, [row])
    before = path.read_bytes()

    def dying():
        yield row
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, dying())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_rows(path, [row, row])
    assert path.read_bytes() == before


def test_files_of_ours_are_known_by_how_they_begin(tmp_path):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    write_rows(path, [Rows(0).row(Kind.SCORED, 0)])
    other.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    assert (is_rows_file(path), is_rows_file(other)) == (True, False)
