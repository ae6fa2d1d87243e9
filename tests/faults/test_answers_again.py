"""Reward math on references that are not those of the first reports: what is right scores 1, what is near scores 0."""

import pytest

from bandpo.train.answers import reference
from bandpo.train.verification import is_readable, verify_one

ANSWERS = {
    # a variable at the end is no unit
    "6m": (["6m", r"6\cdot m"], ["6", r"6\text{ m}", "6n"]),
    "6ab": (["6ab", "6ba"], ["6", "6a"]),
    r"2\pi h": ([r"2\pi h", r"2h\pi"], [r"2\pi", "2"]),
    r"\frac{1}{2}gt": ([r"\frac{gt}{2}"], [r"\frac{1}{2}", r"\frac{1}{2}g"]),
    r"3\sqrt{2}s": ([r"3\sqrt{2}s", r"3s\sqrt2"], [r"3\sqrt{2}", "3"]),
    "$-4c$": (["-4c"], ["-4", "4c"]),
    r"\boxed{7h}": (["7h"], ["7"]),
    "x=5t": (["5t", "x=5t"], ["5", "x=5"]),
    # and a unit is no variable
    "6 m": (["6", r"6\text{ m}", "6 m"], ["60"]),
    "5cm": (["5", r"5\text{ cm}"], ["50"]),
    "8 m/s": (["8", r"8\text{ m/s}", "8 m/s"], ["80"]),
    "30 km/h": (["30", r"30\text{ km/h}"], ["3"]),
    "4 in": (["4", r"4\text{ in}"], ["5"]),
    # ± inside of a fraction or root
    r"\frac{-3 \pm \sqrt{5}}{2}": (
        [r"\frac{-3\pm\sqrt{5}}{2}", r"\frac{-3+\sqrt5}{2},\frac{-3-\sqrt5}{2}", r"-\frac32\pm\frac{\sqrt5}{2}"],
        [r"\frac{-3+\sqrt5}{2}", r"\frac{3\pm\sqrt5}{2}", "-3", "2"],
    ),
    r"\dfrac{1\pm i\sqrt{3}}{2}": ([r"\frac{1\pm i\sqrt3}{2}"], [r"\frac12"]),
    r"x = \frac{1 \pm \sqrt{17}}{4}": ([r"\frac{1\pm\sqrt{17}}{4}"], ["1/4"]),
    r"\frac{a\pm b}{2}, 7": ([r"7,\frac{a\pm b}{2}"], ["7"]),
    # numbers
    "3 1/2": (["3.5", "7/2", r"3\frac12"], ["3/2", "1.5", "31/2", "3"]),
    "-2 3/4": (["-2.75", r"-2\frac{3}{4}"], ["-1.25", "-1.5"]),
    r"0.\overline{3}": (["1/3", r"0.\overline{3}"], ["0.3", "0"]),
    r"1.2\overline{45}": ([r"\frac{137}{110}"], ["1.2", "1.245"]),
    "0x1F": (["31"], ["0", "1"]),
    "0b101": (["5"], ["0", "101"]),
    # characters for commands
    "½": (["1/2", "0.5"], ["1", "2"]),
    "2½": (["2.5"], ["1", "2"]),
    "x²": (["x^2", "x²"], ["x", "2"]),
    "x⁻¹": (["1/x"], ["x"]),
    "10⁵": (["100000", "10^5"], ["10", "5"]),
    "2√3": ([r"2\sqrt{3}", "2√3"], ["2", "3", r"\sqrt3"]),
    "√(x+1)": ([r"\sqrt{x+1}"], ["x", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("gold", ANSWERS)
def test_right_and_near(gold):
    right, near = ANSWERS[gold]
    scores = {a: verify_one(rf"So it is $\boxed{{{a}}}$.", gold) for a in (*right, *near)}
    assert scores == dict.fromkeys(right, 1.0) | dict.fromkeys(near, 0.0)


@pytest.mark.parametrize("gold", [r"\textbf{(B)} 12", "(A) 5", r"\text{(C) } \frac{1}{2}", r"(D) \$5"])
def test_a_letter_with_its_value_is_not_read(gold):
    """Both would be right answers, and either alone would score 0."""
    assert reference(gold) is None
    assert not is_readable(gold)


@pytest.mark.parametrize("gold", [r"\text{(C)}", "(B)", "(A)x", "(3, 4)"])
def test_a_letter_alone_and_a_pair_are(gold):
    assert is_readable(gold)
