"""Checkers that parse: right and wrong answers, and hostile ones, of which each costs itself and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from threading import Timer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.data.rows import Message, Row
from uft.errors import UftError
from uft.rewards import check, isolation, judge
from uft.rewards.parsed import arithmetic, expression

RIGHT = {"exact_match": 1.0, "answered": 1.0}
WRONG = {"exact_match": 0.0, "answered": 1.0}
NONE = {"exact_match": 0.0, "answered": 0.0}


def row(answer=None, **facts):
    return Row("s", 0, (Message("user", "?"),), (), answer, None, facts)


MATH = {  # answer, reply: the verdict
    ("1/2", "so it is 0.5"): RIGHT,
    (r"\frac{1}{2}", r"thus \boxed{\frac{2}{4}}."): RIGHT,
    ("x^2+2x+1", "we get $(x+1)^2$"): RIGHT,
    (r"2\sqrt{2}", r"\[\sqrt{8}\]"): RIGHT,
    (r"\{1,2\}", r"\boxed{2,1}"): RIGHT,
    ("(1,2)", r"\boxed{(2, 1)}"): WRONG,
    ("1,000", "#### 1000"): RIGHT,
    ("-3", "The answer is -3."): RIGHT,
    ("18", "9 of 20 are left, so she has 18 apples."): RIGHT,
    (r"\pi", r"\boxed{3.14}"): WRONG,
    (r"\sin^2 x + \cos^2 x", r"\boxed{1}"): RIGHT,
    ("50%", r"\boxed{50\%}"): RIGHT,
    ("7", "I do not know"): {"exact_match": 0.0},
}


def test_math_compares_symbolically():
    verdicts = judge([("math", row(answer), reply) for answer, reply in MATH])
    for (case, expected), verdict in zip(MATH.items(), verdicts, strict=True):
        assert verdict.figures.items() >= expected.items(), (case, verdict)
    unknown = judge([("math", row(), "5"), ("math", row(r"\begin{"), r"\boxed{x}")])
    assert [verdict.figures for verdict in unknown] == [{}, {}]
    assert unknown[0].reason == "the row has no answer"


def test_the_stated_expression():
    said = {
        r"\boxed{1} then \boxed{\frac{a}{b}}": r"\frac{a}{b}",
        r"\boxed{1": "1",
        "5 #### 7": "7",
        r"$a$ and \(b\)": "b",
        "the answer is 5 or so\nResult: 1/2.": "1/2",
        "": "",
    }
    assert {text: expression(text) for text in said} == said


def test_countdown_wants_every_number_once():
    cases = {
        "<answer>(3 + 4) * 5 = 35</answer>": RIGHT,
        "(3 + 4) × 5": RIGHT,
        "So the answer is: 5*(4+3).": RIGHT,
        "thinking 1+1\n5*3+5*4": WRONG,  # the value, with a number twice
        "3 + 4 + 5": WRONG,
        "35": WRONG,
        "(3 + 4) * 5.0": NONE,
        "5 // 3 + 4": NONE,
        "3 + 4 / 0": NONE,
        "seven times five": NONE,
    }
    jobs = [("countdown", row(numbers=[3, 4, 5], target=35), reply) for reply in cases]
    assert [verdict.figures for verdict in judge(jobs)] == list(cases.values())
    assert check("countdown", row(nums=[1, 3], target="1/3"), "1/3") == RIGHT
    assert judge([("countdown", row(target=3), "3")])[0].reason == "the row has no column numbers or nums"
    assert check("countdown", row(numbers=[1.5, 2.0], target=3), "1+2") == WRONG
    assert check("countdown", row(numbers=[1, 2], target=float("inf")), "1+2") == {}


NUMBERS = st.integers(0, 1000)
EXPRESSIONS = st.recursive(
    NUMBERS.map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda parts: (
            f"({parts[0][0]} {parts[1]} {parts[2][0]})",
            {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}[parts[1]](parts[0][1], parts[2][1]),
            parts[0][2] + parts[2][2],
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_arithmetic_is_that_of_fractions(made):
    text, value, numbers = made
    assert arithmetic(text) == (value, Counter(numbers))


def test_json_by_the_schema_of_the_row():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    cases = {'{"a": 1}': (1, 1), 'So:\n```json\n{"a": 1}\n```': (1, 1), '{"a": "1"}': (0, 1), "{a: 1}": (0, 0)}
    jobs = [("json_schema", row(schema=schema), reply) for reply in cases]
    assert [tuple(verdict.figures.values()) for verdict in judge(jobs)] == list(cases.values())
    bad = [row(), row(schema={"type": 5}), row(schema="x")]
    assert [verdict.figures for verdict in judge([("json_schema", one, "1") for one in bad])] == [{}, {}, {}]
    elsewhere = {"$ref": "http://127.0.0.1:9/schema.json"}  # nothing is fetched
    assert judge([("json_schema", row(schema=elsewhere), "1")])[0].figures == {"valid": 0.0, "parsed": 0.0}


PATCH = "import uft.rewards.parsed as p; p.Countdown.judge = lambda *a: {'exact_match': 1.0, 'answered': 1.0}"
HOSTILE = {
    "a patch of the grader": f"<answer>exec({PATCH!r})</answer>",
    "an import": r"\boxed{__import__('os').system('touch HERE')}",
    "an import, plain": "__import__('os').system('touch HERE')",
    "an attribute": r"$().__class__.__base__.__subclasses__()$",
    "a tower": "9**9**9",
    "a tower of LaTeX": r"$9^{9^{9^{9}}}$",
    "an endless expression": r"$(x+y+z)^{10000} (x+1)$",
    "brackets": "(" * 390_000,
    "boxed brackets": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "a megabyte": "[" * 1_000_000,
    "json brackets": "[" * 390_000 + "]" * 100,
    "a long number": "9" * 390_000,
    "lone surrogates": "\ud800\udfff 5",
    "nothing": "",
    "NUL": "\0" * 100,
}


def test_a_hostile_answer_costs_its_own_reward_alone(tmp_path, monkeypatch):
    """Every hostile answer to every checker that parses, and a right one after each."""
    monkeypatch.setattr(isolation, "SECONDS", 0.3)
    monkeypatch.setattr(isolation, "_child", None)
    schema = {"type": "integer"}
    kinds = {
        "math": (row(r"\frac{5}{3}"), r"\boxed{5/3}"),
        "countdown": (row(numbers=[3, 4], target=12), "3*4"),
        "json_schema": (row(schema=schema), "5"),
        "ifeval": (row(instruction_id_list=["detectable_format:json_format"], kwargs=[{}]), "{}"),
    }
    jobs = []
    for name, (one, answer) in kinds.items():
        for text in HOSTILE.values():
            jobs += [(name, one, text.replace("HERE", str(tmp_path / "touched"))), (name, one, answer)]
    slow = row(schema={"type": "string", "pattern": "^(a+)+$"})  # an exponential pattern, set off by the answer
    jobs += [("json_schema", slow, f'"{"a" * 60}!"'), ("json_schema", slow, '"a"')]
    verdicts = judge(jobs)
    for (name, _, text), verdict in zip(jobs[::2], verdicts[::2], strict=True):
        assert verdict.figures, (name, text[:40], verdict)
        assert next(iter(verdict.figures.values())) == 0, (name, text[:40])
    right = [next(iter(verdict.figures.values())) for verdict in verdicts[1::2]]
    assert right == [1.0] * len(right)
    assert any("CPU time" in (verdict.reason or "") for verdict in verdicts), "and the limit is met at all"
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="\\{}()[]$^_*/+-=<>,.!%&0123456789abefinoqrtx\n ", max_size=80), min_size=1, max_size=8)
)
def test_no_text_stops_the_judging(texts):
    jobs = [(name, row("7", numbers=[3, 4], target=7), text) for text in texts for name in ("math", "countdown")]
    verdicts = judge([*jobs, ("countdown", row(numbers=[3, 4], target=7), "3+4")])
    assert all(set(verdict.figures) == {"exact_match", "answered"} for verdict in verdicts)
    assert verdicts[-1].figures == RIGHT


def test_the_limits_of_the_child_hold(tmp_path):
    """What a parser that was taken over would try, in a process with the child's limits and its audit hook."""
    code = f"""
import ctypes, os, signal, socket, subprocess, sys
from uft.rewards import child
sys.addaudithook(child.refuse)
child.limit(1 << 30)
child.judging = True
tries = {{
    "process": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "fork": os.fork,
    "socket": lambda: socket.create_connection(("127.0.0.1", 9)),
    "file": lambda: open({str(tmp_path / "file")!r}, "w"),
    "library": lambda: ctypes.CDLL(None),
    "signal": lambda: os.kill(os.getppid(), 0),
    "memory": lambda: bytearray(2 << 30),
}}
for name, attempt in tries.items():
    try:
        attempt()
    except (PermissionError, MemoryError) as error:
        print(name, type(error).__name__, flush=True)
child.judging = False
signal.setitimer(signal.ITIMER_PROF, 0.1)
while True:
    try:
        pow(3, 1000)
    except BaseException:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    refused = dict(line.split() for line in done.stdout.splitlines())
    assert refused.pop("memory") == "MemoryError"
    assert refused == dict.fromkeys(
        ("process", "shell", "fork", "socket", "file", "library", "signal"), "PermissionError"
    )
    assert done.returncode == -signal.SIGPROF
    assert list(tmp_path.iterdir()) == []


SAID = [
    "5",
    "[" * 5000,
    "no JSON",
    "x" * 100_000,
    '[{"exact_match": "1", "answered": 1}, null]',
    '[{"score": 1}, null]',
]


HUGE = f'[{{"exact_match": 1{"0" * 400}, "answered": 1}}, null]'  # no float has this value


@pytest.mark.parametrize("line", [*SAID, '[{"exact_match": 2, "answered": NaN}, null]', HUGE])
def test_a_child_that_says_anything_else_gives_no_reward(monkeypatch, line):
    command = [sys.executable, "-S", "-c", "import sys\nsys.stdin.readline()\nprint(sys.argv[1], flush=True)", line]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    monkeypatch.setattr(isolation, "_child", isolation.Child(process))
    verdict = judge([("countdown", row(numbers=[3, 4], target=7), "3+4")])[0]
    assert verdict.figures == NONE
    assert verdict.reason
    if isolation._child is not None:
        isolation._child.close()


def test_the_training_process_imports_nothing_that_the_child_evaluates_with():
    code = (
        "import sys, json\nfrom uft.data.rows import Message, Row\nfrom uft.rewards import judge\n"
        "row = Row('s', 0, (Message('user', '?'),), (), '1/2', None, {'schema': {'type': 'integer'}})\n"
        "found = judge([('math', row, '$2/4$'), ('json_schema', row, '5')])\n"
        "print(json.dumps([[v.figures for v in found], sorted(m for m in sys.modules if '.' not in m)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    figures, modules = json.loads(done.stdout)
    assert figures == [RIGHT, {"valid": 1.0, "parsed": 1.0}]
    assert not {"sympy", "math_verify", "latex2sympy2_extended", "jsonschema", "torch"} & set(modules)


def test_a_signal_that_stops_the_run_costs_no_answer():
    """Schedulers send it to every process: an answer under way must be worth the same as in an undisturbed run."""
    job = ("countdown", row(numbers=[3, 4], target=7), "3+4")
    assert check(*job) == RIGHT
    child = isolation._child.process
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        os.kill(child.pid, number)
        assert check(*job) == RIGHT
    assert isolation._child.process is child
    assert os.getpgid(child.pid) != os.getpgid(0)


def test_a_child_that_is_killed_is_replaced_and_one_that_cannot_start_is_told(monkeypatch):
    job = ("countdown", row(numbers=[3, 4], target=7), "3+4")
    assert check(*job) == RIGHT
    child = isolation._child
    os.kill(child.process.pid, signal.SIGSTOP)  # so that it is killed within an answer, which another child judges
    Timer(0.3, child.process.kill).start()
    assert [verdict.figures for verdict in judge([job, job])] == [RIGHT, RIGHT]
    assert isolation._child.process.pid != child.process.pid
    start, started = isolation.Child.start, []

    def killed():
        started.append(start())
        started[-1].process.kill()
        return started[-1]

    monkeypatch.setattr(isolation, "_child", None)
    with monkeypatch.context() as patch:
        patch.setattr(isolation.Child, "start", killed)
        assert "the system ended the process" in str(judge([job])[0].reason)
    assert len(started) == 2
    monkeypatch.setattr(isolation, "_child", None)
    monkeypatch.setattr(sys, "executable", os.devnull)
    with pytest.raises(UftError, match="process in which answers are judged"):
        check(*job)
