"""Chat templates that raise, loop, grow or read what they should not: a message, never a hang, never an escape."""

import time

import pytest

from uft.data import template as limited
from uft.data.chat import Renderer
from uft.data.rows import Message
from uft.errors import UftError

PROMPT = (Message("user", "q"),)
REPLY = (Message("assistant", "a"),)
LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops within filters": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "a sum": "{{ range(99999) | map('string') | join | length }}" * 2000,
}
GROWS = {
    "a constant": "{{ 'a' * 10**9 }}",
    "a repetition": "{{ messages[0]['content'] * 10**9 }}",
    "a power": "{{ (messages | length + 8) ** (10**8) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "padding": "{{ '%*d' % (10**9, 1) }}",
    "centring": "{{ messages[0]['content'].center(10**9) }}",
    "a format": "{{ '{:>1000000000}'.format('a') }}",
    "replacing": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "a list": "{{ [0] * 10**9 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a billion laughs": "".join(
        f"{{% macro m{n}() %}}{f'{{{{ m{n - 1}() }}}}' * 10 if n else 'ha'}{{% endmacro %}}" for n in range(10)
    )
    + "{{ m9() }}",
    "long, not too large": "{{ 'a' * 5000000 }}",
}
ESCAPES = {
    "the object tree": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "attributes by filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "attributes by format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "a namespace": "{% set n = namespace(__class__='x') %}{{ n.__class__ }}",
    "changing a message": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing a file": "{% import '/etc/passwd' as p %}{{ p }}",
    "extending a file": "{% extends '/etc/passwd' %}",
    "a range too far": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
}
RAISES = {
    "its own words": "{{ raise_exception('no\x1b[31m pirates') }}",
    "a missing key": "{{ messages[0]['contents'] + 'x' }}",
    "a wrong type": "{{ messages + 1 }}",
    "division": "{{ 1 // (messages | length - messages | length) }}",
    "no number": "{{ 'a' | float(default='b') + 1 }}",
    "an attribute": "{{ 'a'.nothing() }}",
    "a filter": "{{ 'a' | nosuchfilter }}",
    "broken syntax": "{% for %}",
    "half a template": "{{ messages[0]",
}


def refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UftError) as error:
        Renderer(tokenizer).encode(PROMPT, REPLY, "mine:7")
    said = str(error.value)
    assert "Traceback" not in said
    assert "data.template" in said
    return said


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_template_that_does_not_end_is_stopped(byte_level, monkeypatch, template):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    before = time.process_time()
    assert "takes more than 0.3 seconds" in refused(byte_level, template)
    assert time.process_time() - before < 10


@pytest.mark.parametrize("template", GROWS.values(), ids=GROWS)
def test_a_template_that_grows_without_end_is_stopped_and_nothing_else_is(byte_level, monkeypatch, template):
    import resource

    monkeypatch.setattr(limited, "SECONDS", 2.0)
    before, peak = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refused(byte_level, template)
    reasons = ("too much memory", "takes more than", "characters where", "too deeply", "sandbox", "Unsafe", "too long")
    assert any(reason in said for reason in reasons), said
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(peak, 4e6) + 1e6  # kilobytes


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_template_reaches_nothing_but_the_messages(byte_level, template):
    byte_level.chat_template = template
    try:
        encoded = Renderer(byte_level).encode(PROMPT, REPLY, "mine:7")
    except UftError as error:
        said = str(error)
    else:
        said = byte_level.decode(encoded.ids.tolist())
    assert not {"root:", "<class", "__builtins__", "uid=", "environ"} & set(said.replace("'", " ").split())
    assert "root:x" not in said
    assert "Traceback" not in said


def test_a_template_does_not_see_the_environment(byte_level, monkeypatch):
    monkeypatch.setenv("PLANTED", "a-value-of-the-environment")
    byte_level.chat_template = (
        "{% for name in ['config', 'request', 'os', 'environ', 'self', 'PLANTED', 'tokenizer'] %}"
        "{{ self._TemplateReference__context }}{{ environ }}{{ os }}{% endfor %}{{ messages[0]['content'] }}"
    )
    try:
        said = byte_level.decode(Renderer(byte_level).encode(PROMPT, REPLY).ids.tolist())
    except UftError as error:
        said = str(error)
    assert "a-value-of-the-environment" not in said


@pytest.mark.parametrize("template", RAISES.values(), ids=RAISES)
def test_what_a_template_raises_is_told_with_the_row(byte_level, template):
    said = refused(byte_level, template)
    assert "row mine:7" in said
    assert "\x1b" not in said


def test_a_row_that_a_template_cannot_finish_is_named_among_others(byte_level, monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    loop = "{% if 'forever' in messages[0]['content'] %}" + LOOPS["loops"] + "{% endif %}"
    byte_level.chat_template = loop + byte_level.chat_template
    renderer = Renderer(byte_level)
    assert renderer.encode(PROMPT, REPLY).supervised.any()
    many = [(PROMPT, REPLY), ((Message("user", "forever"),), REPLY), (PROMPT, REPLY)]
    with pytest.raises(UftError, match="row mine:1") as error:
        renderer.encode_many(many, ["mine:0", "mine:1", "mine:2"])
    assert "takes more than 0.3 seconds" in str(error.value)


def test_many_rows_have_the_time_of_one_each(byte_level, monkeypatch):
    """They are rendered together, and one by one where that takes too long."""
    byte_level.chat_template = "{% for _ in range(50000) %}{% endfor %}" + byte_level.chat_template
    renderer = Renderer(byte_level)
    alone = renderer.encode(PROMPT, REPLY)
    before = time.process_time()
    renderer.encode(PROMPT, REPLY)
    monkeypatch.setattr(limited, "SECONDS", 10 * (time.process_time() - before))
    many = renderer.encode_many([(PROMPT, REPLY)] * 40, [f"mine:{number}" for number in range(40)])
    assert [one.ids.tolist() for one in many] == [alone.ids.tolist()] * 40


def test_marks_of_a_template_are_held_to_the_same_limits(byte_level, monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    said = refused(byte_level, "{% generation %}x{% endgeneration %}" + LOOPS["loops"])
    assert "takes more than 0.3 seconds" in said


def test_limits_leave_long_conversations_alone(byte_level):
    long = "word " * 100_000
    encoded = Renderer(byte_level).encode((Message("user", long),), (Message("assistant", long),))
    assert encoded.targets > 490_000


def test_the_clock_is_the_processor_s(monkeypatch):
    """A process that waits, or is stopped, has used no time."""
    monkeypatch.setattr(limited, "SECONDS", 0.1)

    with limited.limits(0):
        time.sleep(0.5)
    for _ in range(3):  # and the alarm is off afterwards
        sum(range(3_000_000))


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"\x00\x01"])
def test_a_file_that_is_no_template(byte_level, tmp_path, content):
    file = tmp_path / "template.jinja"
    file.write_bytes(content)
    if content.startswith(b"\xff"):
        with pytest.raises(UftError, match="cannot be read"):
            Renderer(byte_level, str(file))
    for name in (tmp_path / ("x" * 300), "a\0b", tmp_path):
        with pytest.raises(UftError, match="no such file"):
            Renderer(byte_level, str(name))
