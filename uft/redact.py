"""Secrets stay out of whatever uft writes: errors, logs, records of runs.

A secret is the value of an environment variable that is named like one (WANDB_API_KEY, HF_TOKEN, DB_PASSWORD), or text
in the form of a token of a service, of a password in a URL or of a key in its query. Nothing here is heavy: the text
of every error passes through it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8  # characters of a value that is hidden; a shorter one would black out ordinary words
CERTAIN = 16  # characters from which a value inside another text is no coincidence

NAMED = re.compile(
    r"(^|_)(TOKENS?|KEYS?|SECRETS?|PASS|PASSWD|PASSPHRASE|CREDENTIALS?|PAT|AUTH)(_|$)|(TOKEN|KEY|SECRET|PASSWORD)$",
    re.IGNORECASE,
)
ABOUT = re.compile(r"_(FILE|PATH|DIR|URL|SOCK|NAME|TTL|TYPE)$", re.IGNORECASE)  # says where a secret is, not what it is

FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_\S{20,}|api_org_[A-Za-z]{20,}|wandb_v\d_\w{20,}|local-[0-9a-f]{40}"
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|xox[abeoprs]-[\w-]{10,})"
    r"|(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)"
    r"|(?<=://)[^\s/@:'\"]{20,}(?=@)"
    r"|(?i:(?<=bearer )[\w.~+/=-]{16,})"
    r"|(?i:(?<=[?&]token=)|(?<=[?&]key=)|(?<=[?&]api_key=)|(?<=[?&]access_token=)|(?<=[?&]password=)|(?<=[?&]secret=)"
    r"|(?<=[?&]sig=)|(?<=[?&]signature=)|(?<=[?&]x-amz-signature=)|(?<=[?&]x-amz-credential=))[^\s&'\"]+"
)
"""Tokens of the hub, W&B, GitHub, GitLab, OpenAI, AWS and Slack; what stands between :// and @; keys of a query."""


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Value -> variable of every secret in the environment, the longest first: one may be part of another."""
    given = os.environ if environment is None else environment
    found = {value: name for name, value in given.items() if _is_secret(name, value)}
    return {value: found[value] for value in sorted(found, key=len, reverse=True)}


def redact(text: str) -> str:
    """`text` with every secret in it hidden."""
    pattern = _pattern(tuple(secrets()))
    if pattern is not None:
        text = pattern.sub(HIDDEN, text)
    return FORMS.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """A JSON value with the secrets in its texts hidden, those in keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(key) if isinstance(key, str) else key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def secret_in(text: str, known: Mapping[str, str]) -> str | None:
    """What secret a setting holds, in words; None where it holds none. `known`: what :func:`secrets` found.

    Stricter than :func:`redact`, which may hide a word too many: a setting is refused for it.
    """
    for value, name in known.items():
        if text == value or (len(value) >= CERTAIN and value in text):
            return f"the value of the environment variable {name}"
    return "what looks like a token or a password" if FORMS.search(text) else None


def tell_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of our processes: the traceback as Python prints it, without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _is_secret(name: str, value: str) -> bool:
    if not NAMED.search(name) or ABOUT.search(name) or len(value) < SHORTEST or value.isdigit():
        return False
    return not os.path.exists(value)


@lru_cache(maxsize=8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """The values, also as JSON, a URL and repr write them, and a private key line by line."""
    lines = [line for value in values for line in (value, *value.splitlines()) if len(line) >= SHORTEST]
    forms = [form for line in lines for form in (line, json.dumps(line)[1:-1], quote(line, safe=""), repr(line)[1:-1])]
    ordered = sorted(dict.fromkeys(forms), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
