"""What the doctor knows of Python source is what Python gives, on random programs of assignments, conditions and calls."""

import contextlib
import random

import pytest

from bandpo.doctor.python_source import UNKNOWN, Given, Source

NAMES = ("a", "b", "c")
DICTS = ("d", "e")
FUNCTIONS = ("f", "g")


class Writer:
    """Random statements, from a seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.calls = 0

    def value(self, depth=0):
        pick = self.random
        plain = [str(pick.randrange(5)), pick.choice(NAMES), repr(pick.choice([True, 0.5, -1]))]
        if depth > 1:
            return pick.choice(plain)
        x, y = self.value(depth + 1), self.value(depth + 1)
        return pick.choice(
            [*plain, f"({x} + {y})", f"({x} if {y} else 7)", f"[{x}, {y}][{pick.randrange(2)}]", f"C.{pick.choice(NAMES)}",
             f"{pick.choice(DICTS)}['a']", f"opaque({x})"]
        )  # fmt: skip

    def record(self):
        self.calls += 1
        extra = self.random.choice(["", f", **{self.random.choice(DICTS)}", f", **dict(v={self.value()})"])
        return f"record({self.calls}, u={self.value()}{extra})"

    def statement(self, depth):
        pick, name, value = self.random, self.random.choice(NAMES), self.value()
        other = pick.choice(DICTS)
        if depth == 0 and pick.random() < 0.6:
            return [pick.choice([f"{name} = {value}", f"{other}[{name!r}] = {value}", self.record(), self.record()])]
        rare = [f"del {name}", "exec('a = 9')", f"globals()[{name!r}] = 8"] if pick.random() < 0.05 else []
        plain = [
            *rare, f"{name} = {value}",
            f"{other} = {pick.choice(DICTS)}", f"{name}: int = {value}", f"{name}, q = {value}, 1", f"{name} += 1",
            f"{other} = {{'a': {value}, 'b': 2}}", f"{other} = dict({name}={value})", f"{other}[{name!r}] = {value}",
            f"{other}.update({name}={value})", f"{other} = {{**{pick.choice(DICTS)}, 'c': {value}}}", f"C.{name} = {value}",
            f"setattr(C, {name!r}, {value})", self.record(), self.record(), f"{name} = (z := {value})",
            f"{pick.choice(FUNCTIONS)}()", f"{other} = {pick.choice(DICTS)} | {{'a': 1}}",
        ]  # fmt: skip
        if depth > 2 or pick.random() < 0.7:
            return [pick.choice(plain)]
        head = pick.choice(
            ["if chance():", f"for {name} in (1, 2):", "while chance():", "with nothing():", "try:", "class C:",
             f"def {pick.choice(FUNCTIONS)}():"]
        )  # fmt: skip
        body = self.body(depth + 1)
        if head.startswith("def") and pick.random() < 0.5:
            body = [f"global {name}", *body]
        if head == "class C:":
            body = [f"{x} = {self.value()}" for x in NAMES]
        lines = [head, *(f"    {line}" for line in body)]
        if head == "try:":
            lines += ["except Exception:", *(f"    {line}" for line in self.body(depth + 1))]
        elif head.startswith("if") and pick.random() < 0.5:
            lines += ["else:", *(f"    {line}" for line in self.body(depth + 1))]
        return lines

    def body(self, depth):
        return [line for _ in range(self.random.randrange(1, 5)) for line in self.statement(depth)]


def run(text, seed):
    """What each call got, in a run whose conditions are random."""
    found = {}
    chance = random.Random(seed)
    steps = iter(range(300))

    def record(number, **options):
        next(steps)
        found.setdefault(number, []).append(options)

    def is_so():
        return next(steps, -1) >= 0 and chance.random() < 0.5

    place = {"record": record, "chance": is_so, "opaque": lambda x: x, "nothing": contextlib.nullcontext}
    with contextlib.suppress(Exception):  # an unbound name, for example, ends the program
        exec(text, place)
    return found


@pytest.mark.parametrize("block", range(8))
def test_what_is_known_is_what_any_run_gives(block):
    known = 0
    for seed in range(block * 50, block * 50 + 50):
        writer = Writer(seed)
        first = ["a, b, c = 1, 2, 3", "d, e = {'a': 1}, {'b': 2}", "class C:", "    a = 1", "    b = 2", "    c = 3"]
        first += ["def f():", "    pass", "def g():", "    pass"]
        text = "\n".join([*first, *(line for _ in range(6) for line in writer.body(0)), writer.record()])
        source = Source([("", text)])
        given = {call.node.args[0].value: source.given(call) for call in source.calls if call.name == "record"}
        for luck in range(3):
            for number, runs in run(text, luck).items():
                known += sum(agrees(given[number], options, text) for options in runs)
    assert known > 250, known  # and much is known


def agrees(given: Given, options, text):
    """Number of known values, all of which are those of the run."""
    for key, value in given.values.items():
        assert value is not UNKNOWN
        assert key in options or given.opened, text
        assert options[key] == value and type(options[key]) is type(value), (key, value, options, text)
    missing = set(options) - set(given.values) - set(given.unread)
    assert not missing or given.opened, (missing, text)
    return len(given.values)
