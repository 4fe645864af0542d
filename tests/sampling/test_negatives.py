from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from uft.config.schema import Generate, Model, data_settings
from uft.data.chat import Renderer
from uft.data.rows import Completion, Kind, Message, Row
from uft.data.sources import LoadedSource, load_sources
from uft.errors import UftError
from uft.model.load import load_model, load_tokenizer
from uft.model.policy import Policy
from uft.sampling.generate import Interrupted, Sampling, complete, filtered
from uft.sampling.negatives import generate_rows, number_of

MODEL = Model(name="playground", path="builtin:playground")
SETTINGS = Generate(seeds=[0, 1], temperature=1.0, top_k=0, max_new_tokens=10, limit=6, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model(MODEL, torch.device("cpu"), 0))


@pytest.fixture(scope="module")
def sources():
    data = {
        "name": "both",
        "sources": {
            "instruct": {"path": "builtin:playground/instruct"},
            "pairs": {"path": "builtin:playground/pairs"},
        },
    }
    return load_sources(data_settings(data))


@pytest.fixture
def job(policy, tokenizer, sources, tmp_path):
    """Run the job; keywords change the settings, `sources` and hooks."""

    def run(
        out=None,
        *,
        given=None,
        sampled_by="playground",
        should_stop=lambda: False,
        progress=None,
        scorer=None,
        **changes,
    ):
        return generate_rows(
            policy,
            Renderer(tokenizer),
            sources if given is None else given,
            replace(SETTINGS, **changes),
            out or tmp_path / "negatives.jsonl",
            sampled_by=sampled_by,
            score=scorer,
            should_stop=should_stop,
            progress=progress or (lambda done, of: None),
        )

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_gets_one_sample_per_seed(job, sources):
    told = []
    summary = job(progress=lambda done, total: told.append((done, total)))
    written = lines(summary.path)
    wanted = [row for source in sources for row in source.rows[:6]]
    assert [line["row"] for line in written] == [row.id for row in wanted]
    assert [line["prompt"] for line in written] == [row.prompt[0].content for row in wanted]
    assert [line["response"] for line in written] == [row.completions[0].text for row in wanted]
    assert all(len(line["negatives"]) == len(line["negative_log_probs"]) == 2 for line in written)
    assert all(line["sampled_by"] == "playground" for line in written)
    assert written[0]["sampling"]["temperature"] == 1.0
    assert (summary.rows, summary.negatives, summary.left_out, summary.resumed) == (12, 24, 0, 0)
    assert summary.repeats == sum(line["negatives"].count(line["response"]) for line in written)
    assert told == [(4, 12), (8, 12), (12, 12)]


def test_data_reads_what_is_written(job, sources):
    path = job().path
    (read,) = load_sources(data_settings({"name": "made", "sources": {"made": {"path": str(path)}}}))
    assert len(read.rows) == 12
    for line, row, original in zip(lines(path), read.rows, [*sources[0].rows[:6], *sources[1].rows[:6]], strict=True):
        assert row.kind is Kind.NEGATIVES
        assert row.prompt == original.prompt
        assert row.completions[0].turns == original.completions[0].turns
        assert [completion.text for completion in row.completions[1:]] == line["negatives"]
        assert {completion.sampled_by for completion in row.completions[1:]} == {"playground"}
        assert (row.answer, row.task) == (original.answer, original.task)


def test_messages_stay_messages(job):
    prompt = (Message("user", "copy : owl"), Message("assistant", "owl"), Message("user", "copy : cat"))
    turns = (Message("assistant", "cat"), Message("user", "copy : bear"), Message("assistant", "bear"))
    row = Row("talk", 0, prompt, (Completion(turns),))
    path = job(given=[LoadedSource("talk", "here", (row,), (), "")]).path
    (read,) = load_sources(data_settings({"name": "made", "sources": {"talk": {"path": str(path)}}}))
    assert read.rows[0].prompt == prompt
    assert read.rows[0].completions[0].turns == turns


def test_other_sources_and_limits_do_not_change_a_row(job, sources, tmp_path):
    everything = {line["row"]: line["negatives"] for line in lines(job(tmp_path / "a").path)}
    alone = lines(job(tmp_path / "b", given=sources[1:], limit=2).path)
    assert len(alone) == 2
    assert all(everything[line["row"]] == line["negatives"] for line in alone)


@pytest.fixture
def whole(job, tmp_path):
    """The file of a job that was never disturbed."""
    return job(tmp_path / "whole").path.read_bytes()


def test_a_stopped_job_continues_to_the_same_file(job, tmp_path, whole):
    for polls in (0, 9, 25, 40):
        left, told, out = iter(range(polls)), [], tmp_path / f"stopped-{polls}"
        with pytest.raises(Interrupted):
            job(out, should_stop=lambda left=left: next(left, None) is None)
        written = out.read_bytes()
        assert written == b"" or written.endswith(b"\n")
        before = len(lines(out))
        summary = job(out, progress=lambda done, total, told=told: told.append(done))
        assert out.read_bytes() == whole
        assert summary.resumed == before < 12
        assert told[-1] == 12


def test_a_torn_last_line_is_made_again(job, tmp_path, whole):
    out, last = tmp_path / "torn", whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (1, 7, 8, 40, 300):
        out.write_bytes(whole[: last + min(cut, len(whole) - last - 1)])
        assert job(out).resumed == 11
        assert out.read_bytes() == whole


def test_after_any_line_batches_are_those_of_a_job_that_was_never_stopped(job, tmp_path, monkeypatch):
    """Kernels round differently in batches of another shape, and the fourth digit of a log-prob may tell."""
    batches = []

    def watched(*arguments, numbers, **options):
        batches.append(tuple(numbers))
        return complete(*arguments, numbers=numbers, **options)

    monkeypatch.setattr("uft.sampling.generate.complete", watched)
    whole, out = job(tmp_path / "whole").path.read_bytes(), tmp_path / "stopped"
    of_the_whole = list(batches)
    for kept in (1, 4, 6, 11):
        batches.clear()
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
        job(out)
        assert out.read_bytes() == whole
        assert batches == of_the_whole[2 * (kept // 4) :]  # of four rows, for each of two seeds


def test_repeats_of_the_rows_own_completion_may_be_left_out(job, sources, tmp_path):
    kept = job(tmp_path / "kept")
    assert kept.repeats > 0, "else this says nothing"
    dropped = job(tmp_path / "dropped", repeats="drop")
    assert dropped.repeats == 0
    assert dropped.left_out == kept.left_out + kept.repeats, "they are counted"
    expected = {line["row"]: [n for n in line["negatives"] if n != line["response"]] for line in lines(kept.path)}
    found = {line["row"]: line["negatives"] for line in lines(dropped.path)}
    assert found == {row: negatives for row, negatives in expected.items() if negatives}
    whole = dropped.path.read_bytes()
    dropped.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    again = job(tmp_path / "dropped", repeats="drop")
    assert (again.path.read_bytes(), again.left_out) == (whole, dropped.left_out)
    with pytest.raises(UftError, match="repeats: 'drop' in the file"):
        job(tmp_path / "dropped")


def test_scored_samples_are_rows_of_scored_completions(job, sources, tmp_path):
    """The figure of the checker beside every sample; a row needs no good completion then."""
    plain = {line["row"]: line["negatives"] for line in lines(job(tmp_path / "plain").path)}
    path = job(tmp_path / "scored.jsonl", score=True, scorer=lambda row, text: len(text) % 2 / 2).path
    for line in lines(path):
        assert line["negatives"] == plain[line["row"]]
        assert line["score"] == [len(text) % 2 / 2 for text in line["negatives"]]
        assert "response" not in line
    (read,) = load_sources(data_settings({"name": "made", "sources": {"made": {"path": str(path)}}}))
    assert set(read.kinds) == {Kind.SCORED}
    first, line = read.rows[0], lines(path)[0]
    assert [completion.text for completion in first.completions] == line["negatives"]
    assert [completion.score for completion in first.completions] == line["score"]
    bad = Row("bad", 0, (Message("user", "copy : owl"),), (Completion((Message("assistant", "cat"),), label=False),))
    alone = [LoadedSource("bad", "here", (bad,), (), "")]
    summary = job(tmp_path / "bad.jsonl", given=alone, score=True, scorer=lambda row, text: 1.0)
    assert (summary.rows, summary.without_good) == (1, 0)


@pytest.mark.parametrize("score", [[0.5], 0.5, [0.5, 2.0], None])
def test_scores_that_do_not_fit_the_samples_are_told(score, tmp_path):
    path = tmp_path / "scored.jsonl"
    good = {"prompt": "p", "negatives": ["a", "b"], "score": [0, 1]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, {**good, "score": score})))
    with pytest.raises(UftError, match=r"scored.jsonl:2  +score"):
        load_sources(data_settings({"name": "made", "sources": {"made": {"path": str(path)}}}))


def test_other_settings_are_refused(job):
    content = job().path.read_bytes()
    cases = {
        "temperature: 1.0 in the file, 0.5 now": {"temperature": 0.5},
        "seeds: [0, 1] in the file, [0] now": {"seeds": [0]},
        "system: None in the file, 'Be bad.' now": {"system": "Be bad."},
        "sampled_by: 'playground' in the file, 'another' now": {"sampled_by": "another"},
    }
    for said, changes in cases.items():
        with pytest.raises(UftError) as refused:
            job(**changes)
        assert said in str(refused.value)
    assert job().path.read_bytes() == content


def test_other_rows_are_refused(job, sources):
    job()
    changed = replace(sources[0].rows[0], prompt=(Message("user", "copy : cat"),))
    other = replace(sources[0], rows=(changed, *sources[0].rows[1:]))
    with pytest.raises(UftError, match="row instruct:0 is another one"):
        job(given=[other, sources[1]])


def test_a_file_of_other_rows_is_never_touched(job, tmp_path):
    out = tmp_path / "theirs"
    for content in (b"mine", b"my notes\n", b'{"prompt": "x"}\n', b"\xff\xfe\n", b"[]\n", b'{"row": "a:0"}\nmine'):
        out.write_bytes(content)
        with pytest.raises(UftError, match="not written by uft generate"):
            job(out)
        assert out.read_bytes() == content


def test_rows_without_a_good_completion_are_counted(job, sources):
    reply = (Message("assistant", "owl"),)
    rows = [
        Row("mixed", 0, (Message("user", "copy : owl"),), (Completion(reply, label=False),)),
        Row("mixed", 1, (Message("user", "copy : owl"),), (Completion(reply, label=True),)),
        Row("mixed", 2, (Message("user", "copy : owl"),), (Completion(reply, score=0.2),)),
    ]
    summary = job(given=[LoadedSource("mixed", "here", tuple(rows), (), "")])
    assert [line["row"] for line in lines(summary.path)] == ["mixed:1"]
    assert summary.without_good == 2


def test_the_system_prompt_is_sampled_under_but_not_written(policy, tokenizer, sources, job):
    path = job(system="copy : owl", given=sources[:1], limit=2).path
    renderer = Renderer(tokenizer)
    for line, row in zip(lines(path), sources[0].rows, strict=False):
        assert line["prompt"] == row.prompt[0].content
        (reply,) = complete(
            policy,
            [renderer.prompt_ids(row.prompt, "copy : owl")],
            Sampling(temperature=1.0, max_new_tokens=10),
            seed=0,
            stop_ids=renderer.stop_ids,
            pad_id=0,
            batch_size=1,
            numbers=[number_of(row)],
        )
        assert line["negatives"][0] == tokenizer.decode(reply.ids)
        assert line["negative_log_probs"][0] == pytest.approx(reply.log_prob, abs=1e-3)


class Mute:
    """A tokenizer that has nothing but space to say of some replies."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def decode(self, ids, **options):
        return " \n" if sum(ids) % 3 == 0 else "  " + self.tokenizer.decode(ids, **options)


def test_empty_samples_are_kept_out_and_leading_space_stripped(policy, tokenizer, sources, tmp_path):
    renderer = Renderer(tokenizer)
    renderer.tokenizer = Mute(tokenizer)
    summary = generate_rows(policy, renderer, sources, SETTINGS, tmp_path / "out", sampled_by="m")
    written = lines(summary.path)
    assert summary.left_out > 0
    assert summary.negatives + summary.left_out == 24
    assert all(line["negatives"] and all(text == text.lstrip() != "" for text in line["negatives"]) for line in written)
    assert all(len(line["negatives"]) == len(line["negative_log_probs"]) for line in written)
    content = summary.path.read_bytes()
    summary.path.write_bytes(b"".join(content.splitlines(keepends=True)[:5]))
    again = generate_rows(policy, renderer, sources, SETTINGS, tmp_path / "out", sampled_by="m")
    assert again == replace(summary, resumed=5)
    assert summary.path.read_bytes() == content


def test_cut_samples_are_left_out_and_log_probs_are_those_of_the_filters(job, policy, tokenizer, sources, tmp_path):
    """A sample without its end would be trained with one, whose log-prob its column lacks."""
    free = lines(job(tmp_path / "free", max_new_tokens=10, temperature=0.7, top_k=3).path)
    tokens = sorted(len(tokenizer(text).input_ids) for line in free for text in line["negatives"])
    short = job(tmp_path / "short", max_new_tokens=tokens[-1], temperature=0.7, top_k=3)
    whole = {line["row"]: dict(zip(line["negatives"], line["negative_log_probs"], strict=True)) for line in free}
    assert 0 < short.negatives == 24 - short.left_out < 24
    for line in lines(short.path):
        assert len(tokenizer(line["negatives"][0]).input_ids) < tokens[-1]
        for text, log_prob in zip(line["negatives"], line["negative_log_probs"], strict=True):
            assert whole[line["row"]][text] == pytest.approx(log_prob, abs=1e-3)
    renderer, sampling = Renderer(tokenizer), Sampling(temperature=0.7, top_k=3)
    row = sources[0].rows[0]
    for text, log_prob in whole[row.id].items():
        encoded = renderer.encode(row.prompt, (Message("assistant", text),))
        logits = policy.module.eval()(torch.as_tensor(encoded.ids, dtype=torch.long)[None]).logits[0].detach()
        places = torch.as_tensor(encoded.supervised).nonzero().squeeze(1)
        warped, targets = filtered(logits, sampling).log_softmax(-1), torch.as_tensor(encoded.ids)[places].long()
        assert float(warped[places - 1, targets].sum()) == pytest.approx(log_prob, abs=1e-3)
