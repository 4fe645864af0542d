"""What a row hashes to."""

from dataclasses import replace

from uft.data.rows import Completion, Message, Row, content_digest, prompt_hash

ROW = Row("s", 0, (Message("user", "q"),), (Completion((Message("assistant", "a"),)),))


def test_name_and_number_do_not_enter_but_everything_said_does():
    digest = content_digest([ROW])
    assert digest == content_digest([replace(ROW, source="t", index=9)])
    completion = ROW.completions[0]
    changed = [
        replace(ROW, prompt=(Message("system", "q"),)),
        replace(ROW, answer="a"),
        replace(ROW, task="t"),
        *(
            replace(ROW, completions=(replace(completion, **field),))
            for field in ({"label": True}, {"label": False}, {"score": 1.0}, {"preferred": True}, {"sampled_by": "m"})
        ),
    ]
    digests = {content_digest([row]) for row in changed}
    assert len(digests | {digest}) == len(changed) + 1


def test_turns_cannot_be_shifted_into_each_other():
    apart = replace(ROW, prompt=(Message("user", "a"), Message("user", "b")))
    joined = replace(ROW, prompt=(Message("user", 'a"],["user","b'),))
    assert content_digest([apart]) != content_digest([joined])


def test_a_prompt_s_hash_is_blind_to_white_space_at_its_ends():
    assert prompt_hash((Message("user", " q\n"),)) == prompt_hash((Message("user", "q"),))
    assert prompt_hash((Message("user", "q"),)) != prompt_hash((Message("system", "q"),))
