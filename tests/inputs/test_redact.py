"""What is taken for a secret, and what is not."""

import json

import pytest

from uft.errors import Problem, UftError, redact, redacted, render, secret_in, secrets
from uft.runs import create_run, write_json

VALUE = "s3cr3t-value/with+signs"
FORMS = {
    "hub": "hf_" + "aB3" * 12,
    "wandb": "wandb_v1_" + "x7" * 20,
    "github": "ghp_" + "a1" * 18,
    "github, fine": "github_pat_" + "a1" * 20,
    "openai": "sk-proj-" + "a1" * 20,
    "aws": "AKIA" + "A1B2" * 4,
    "bearer": "f00d" * 8,
    "password of a URL": "hunter2!",
    "token of a URL": "tok" * 8,
    "key of a query": "abc%2Fdef",
}
AROUND = {
    "bearer": "Authorization: Bearer {}",
    "password of a URL": "cannot reach https://me:{}@host:80/x",
    "token of a URL": "https://{}@host/x.git",
    "key of a query": "GET https://host/x?a=1&token={}&b=2",
}


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "MY_SECRET",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "api_key",
        "GITHUB_PAT",
        "X_AUTH",
    ],
)
def test_variables_that_are_named_like_secrets(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    assert secrets()[VALUE] == name
    assert redact(f"a {VALUE} b") == "a *** b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-as-can-be"),
        ("KEYBOARD_LAYOUT", "us-international"),
        ("WANDB_IDENTITY_TOKEN_FILE", "/run/secrets/wandb"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-agent.1"),
        ("MY_KEY", "short"),
        ("MY_KEY", "123456789012"),
        ("MY_KEY", "/usr"),
        ("MONKEY", "banana-banana"),
    ],
)
def test_variables_that_are_not(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    if name != "MONKEY":  # ends in KEY, so it is hidden: a word too many rather than one too few
        assert value not in secrets()
        assert redact(value) == value


@pytest.mark.parametrize("name", FORMS)
def test_tokens_by_their_form(name):
    text = AROUND.get(name, "said {} to somebody").format(FORMS[name])
    assert FORMS[name] not in redact(text)
    assert text.startswith(redact(text).partition("***")[0])
    assert text.endswith(redact(text).rpartition("***")[2])


@pytest.mark.parametrize(
    "text",
    [
        "uft train objective=ift data=mix",
        "https://huggingface.co/org/name and mail@example.org",
        "org/sk-model at 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
        "x" * 10_000,
        "git@github.com:org/name.git",
        "12:30:45 step 10 | loss 1.2",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert redact(text) == text


def test_secrets_are_found_however_they_are_written(monkeypatch):
    odd = 'p"a\\ss/wörd\n-----BEGIN KEY-----\nMIIabcdefgh'
    monkeypatch.setenv("ODD_SECRET", odd)
    for text in (odd, json.dumps(odd), repr(odd), "before\nMIIabcdefgh\nafter", json.dumps(odd, ensure_ascii=False)):
        assert "MIIabcdefgh" not in redact(text)
        assert "a\\ss" not in redact(text)


def test_the_longer_of_two_is_hidden_whole(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert redact("abcdefgh-and-more") == "***"


def test_errors_and_records_do_not_tell(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    error = UftError(Problem(VALUE, f"why {VALUE}", f"where:{VALUE}", (f"do {VALUE}",)), footer=f"uft {VALUE}")
    for said in (render(error), str(error), repr(error.problems), repr(error)):
        assert VALUE not in said
    write_json(tmp_path / "x.json", {"a": [VALUE, {"b": f"x{VALUE}y"}], VALUE: (VALUE,)})
    run = create_run(tmp_path / "run", "a: 1\n", [f"x={VALUE}"], command=["uft", VALUE])
    for file in [tmp_path / "x.json", *run.path.iterdir()]:
        assert VALUE not in file.read_text()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": ["***", {"b": "x***y"}], "***": ["***"]}
    assert redacted({"n": 1, "f": 0.5, "none": None, "t": True}) == {"n": 1, "f": 0.5, "none": None, "t": True}


def test_a_setting_is_refused_only_where_it_surely_holds_a_secret(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "development")  # a word, as some have it
    known = secrets()
    assert secret_in("/data/development/rows.jsonl", known) is None
    assert "SECRET_KEY" in str(secret_in("development", known))
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert "HF_TOKEN" in str(secret_in(f"https://host/{VALUE}/x", secrets()))
    assert "token or a password" in str(secret_in("https://u:pw@host", secrets()))


def test_texts_of_problems_move_no_cursor_and_end():
    problem = Problem("a\x1b[2Jb", "\u202egnp.exe\ud83d", "x" * 100_000, ("\x07",))
    assert problem.what == "a\\x1b[2Jb"
    assert problem.why == "\\u202egnp.exe\\ud83d"
    assert len(problem.where) < 5000
    assert problem.advice == ("\\x07",)
    assert Problem("naïve 日本 👩\u200d👧", "").what == "naïve 日本 👩\u200d👧"
