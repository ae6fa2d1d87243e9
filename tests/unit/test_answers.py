r"""What `reward: math` reads: references as datasets write them, boxes as models write them.

The right values are mathematics: of each reference, completions that mean the same, and near misses that do not.
"""

import time

import pytest

from bandpo.train.answers import as_latex, boxed_answer, reference, stated_answer
from bandpo.train.verification import unreadable, verify_all, verify_one

# (reference, boxes that are right, boxes that are not: first of all the numbers that stand in the reference)
CASES = [
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}"], ["2", r"2\sqrt{2}", "3"]),
    (r"\sqrt{15}", [r"\sqrt{15}"], ["15", r"\sqrt{14}"]),
    (r"\frac{3}{4}", [r"\frac{3}{4}", "0.75", "3/4"], ["3", "4", r"\frac{4}{3}"]),
    (r"\dfrac{1}{2}", [r"\frac12"], ["1", "2"]),
    (r"-\frac{5}{3}", [r"-\frac{5}{3}"], ["5", "3", r"\frac53"]),
    (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt{3}}{2}"], ["3", "2", r"\sqrt{3}"]),
    (r"\frac{2+\sqrt{5}}{3}", [r"\frac{2+\sqrt{5}}{3}"], ["2", "3", "5"]),
    (r"10\pi", [r"10\pi", r"10 \pi"], ["10", r"\pi", r"9\pi"]),
    (r"\frac{\pi}{6}", [r"\frac{\pi}{6}", r"\pi/6"], ["6", r"\pi"]),
    (r"2k+2", ["2k+2", "2(k+1)"], ["2", "2k", "k+2"]),
    (r"x^2-3x+2", ["x^2-3x+2", "(x-1)(x-2)"], ["2", "x^2", "x^2-3x+1"]),
    (r"1\pm\sqrt{19}", [r"1\pm\sqrt{19}"], ["1", "19", r"1+\sqrt{19}"]),
    (r"2^{10}", ["2^{10}", "1024"], ["2", "10", "1023"]),
    (r"9!", ["9!", "362880"], ["9", "8!"]),
    (r"2:3", ["2:3"], ["2", "3", "3:2"]),
    (r"3*x-1*y+13=0", ["3x-y+13=0", "3*x-1*y+13=0"], ["3x+4y+14=0", "3", "13", "3x-y+14=0"]),
    (r"y=2x+3", ["y=2x+3"], ["y=2x", "3", "2", "y=2x+4"]),
    (r"x=5", ["x=5", "5"], ["x=4", "4", "x"]),
    (
        r"1331 and 1728",
        [r"1331 \text{ and } 1728", "1331, 1728", "1331 and 1728", "1728,1331"],
        ["1728", "1331", "1331,1729"],
    ),
    (r"1331 \text{ and } 1728", ["1331, 1728"], ["1728", "1331"]),
    (r"2, 3, 5", ["2,3,5", "5,3,2"], ["2", "5", "2,3"]),
    (r"\{1,2,3\}", [r"\{1,2,3\}", r"\{3,2,1\}"], ["1", "3", r"\{1,2\}", r"\{1,2,4\}"]),
    (r"(0,1)", ["(0,1)"], ["0", "1", "(0,2)", "(1,0)"]),
    (r"[0,1)", ["[0,1)"], ["0", "1", "[0,2)"]),
    (r"(-\infty, 2]", [r"(-\infty, 2]", r"(-\infty,2]"], ["2", r"(-\infty, 3]"]),
    (r"(-\infty,-1)\cup(3,\infty)", [r"(-\infty,-1)\cup(3,\infty)"], ["-1", "3", r"(3,\infty)"]),
    (r"(2,-3)", ["(2,-3)"], ["2", "-3", "(-3,2)"]),
    (r"(1,2,3)", ["(1,2,3)"], ["1", "3", "(3,2,1)"]),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
        ["1", "4", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"],
    ),
    (
        r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}",
        [r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"],
        ["1", "-2", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"],
    ),
    (r"x>3", ["x>3"], ["3", "x>4", "x<3"]),
    (r"1<x\le 4", [r"1<x\le 4"], ["1", "4", r"1<x\le 5"]),
    (r"x \geq 2", [r"x\ge 2", r"x \geq 2"], ["2", r"x \geq 3"]),
    (r"\log_2 5", [r"\log_2 5", r"\log_{2} 5"], ["2", "5"]),
    (r"e^{-1}", ["e^{-1}", r"\frac{1}{e}"], ["e", "-1", "1"]),
    (r"\ln 2", [r"\ln 2", r"\ln(2)"], ["2"]),
    (r"\sin 30^\circ", [r"\sin 30^\circ"], ["30"]),
    (r"45^\circ", [r"45^\circ", "45"], ["44", r"46^\circ"]),
    (r"3+4i", ["3+4i"], ["3", "4", "3-4i"]),
    (r"\binom{10}{3}", [r"\binom{10}{3}", "120"], ["10", "3", "119"]),
    (r"1,450", ["1450", "1,450", "1{,}450"], ["1", "450", "1451"]),
    (r"12{,}345", ["12345", "12,345"], ["12", "345"]),
    (r"1,234,567", ["1234567", "1,234,567"], ["1", "567"]),
    (r"50%", [r"50\%", "50%"], ["49\\%"]),
    (r"50\%", [r"50\%"], ["49\\%"]),
    (r"37.5\%", [r"37.5\%"], ["37\\%"]),
    (r"5 \text{ cm}", ["5", r"5 \text{ cm}", r"5\text{ cm}"], ["6", "4"]),
    (r"12\text{ miles per hour}", ["12", r"12 \text{ miles per hour}"], ["13"]),
    (r"7\,\text{cm}^2", ["7", r"7\text{ cm}^2", r"7 \text{ cm}^2"], ["49", "2"]),
    (r"\$18", ["18", r"\$18"], ["17"]),
    (r"$18", ["18", r"\$18"], ["17"]),
    (r"\text{Tuesday}", [r"\text{Tuesday}", r"\textbf{Tuesday}"], [r"\text{Monday}", "2"]),
    (r"Tuesday", [r"\text{Tuesday}", "Tuesday"], [r"\text{Monday}"]),
    (r"\text{(B)}", [r"\text{(B)}", "B", "(B)"], ["A", r"\text{(A)}"]),
    (r"B", ["B", r"\text{B}"], ["A", "C"]),
    (r"\text{no solution}", [r"\text{no solution}"], ["0", "1"]),
    (r"\varnothing", [r"\varnothing", r"\emptyset"], ["0"]),
    (r"101_2", ["101_2"], ["101", "2"]),
    (r"72", ["72"], ["7", "2", "73"]),
    (r"-3", ["-3"], ["3"]),
    (r"0", ["0"], ["1"]),
    (r"0.25", ["0.25", r"\frac14"], ["0", "25"]),
    (r"3.14\times 10^{5}", [r"3.14\times 10^{5}", "314000"], ["3.14", "5"]),
    (r"6.02e23", ["6.02\\times 10^{23}"], ["6.02"]),
    (r"1/2", [r"\frac12", "1/2", "0.5"], ["1", "2"]),
    (r"2\frac{1}{3}", [r"2\frac{1}{3}", r"\frac{7}{3}"], ["2", "3", r"\frac{2}{3}"]),
    (r"|x-2|", ["|x-2|"], ["2", "x-2"]),
    (r"\infty", [r"\infty"], ["0"]),
    (r"\sqrt[3]{5}", [r"\sqrt[3]{5}"], ["3", "5", r"\sqrt{5}"]),
    (r"\frac{n(n+1)}{2}", [r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"], ["2", "n"]),
    (r"f(x)=x^2+1", ["f(x)=x^2+1", "x^2+1"], ["f(x)=x^2", "1"]),
    (r"a=2, b=3", ["a=2, b=3"], ["2", "3", "a=2,b=4"]),
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", ["72"], ["24", "48", "7"]),
    ("She pays $1,450.\n#### 1,450", ["1450", "1,450"], ["1", "450"]),
    ("x\n#### -5", ["-5"], ["5"]),
    (r"$\frac{1}{2}$", ["0.5"], ["1"]),
    (r"so \boxed{7}", ["7"], ["6"]),
    (r"5 apples", ["5", r"5\text{ apples}"], ["4"]),
    (r"18 dollars", ["18"], ["17"]),
    (r"5 pi", [r"5\pi"], ["5"]),
    (r"sqrt(3)", [r"\sqrt{3}"], ["3"]),
    (r"2*sqrt(3)", [r"2\sqrt{3}"], ["2", "3"]),
    (r"The answer is 18.", ["18"], ["17"]),
    (r"yes", ["yes", r"\text{yes}"], ["no"]),
    (r"True", ["True", r"\text{True}"], [r"\text{False}"]),
    (r"4:30", ["4:30"], ["4", "30"]),
    (r"12 or 15", ["12, 15"], ["12", "15"]),
    (r"x^2 + y^2 = 25", ["x^2+y^2=25"], ["25", "x^2+y^2=24"]),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", [r"\frac{x^2}{4}+\frac{y^2}{9}=1"], ["1", r"\frac{x^2}{9}+\frac{y^2}{4}=1"]),
    (r"7.0", ["7"], ["6"]),
    (r"007", ["7"], ["6"]),
    (r"10\text{th}", ["10"], ["9"]),
    (r"1 : 4", ["1:4"], ["1", "4"]),
    (r"\$5.50", ["5.50", "5.5"], ["5"]),
    (r"C_{10}^{3}", [r"C_{10}^{3}"], ["3", "10"]),
    (r"(x+1)(x-1)", ["x^2-1"], ["1"]),
    (r"2 \cdot 3^5", ["486", r"2\cdot 3^5"], ["2"]),
    (r"100\,000", ["100000"], ["100", "0"]),
    (r"\pm 3", [r"\pm 3", "3,-3"], ["3", "-3"]),
    (r"\left(\frac{1}{2}, 3\right)", [r"(\frac12,3)"], ["3", r"(3,\frac12)"]),
    (r"16\sqrt{2}-4\pi", [r"16\sqrt{2}-4\pi"], ["16", r"16\sqrt{2}"]),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), CASES, ids=[case[0][:40] for case in CASES])
def test_a_reference_is_read_as_a_whole(gold, right, wrong):
    for box in right:
        assert verify_one(rf"So it is $\boxed{{{box}}}$.", gold) == 1, box
    for box in wrong:
        assert verify_one(rf"So it is $\boxed{{{box}}}$.", gold) == 0, box
    assert not unreadable([gold])


def test_there_are_enough_of_them():
    assert len(CASES) >= 100
    assert sum("#" not in gold and "$" not in gold and "boxed" not in gold for gold, _, _ in CASES) >= 50


@pytest.mark.parametrize(
    "gold",
    [
        "3 hours 20 minutes",
        r"3\text{ hours }20\text{ minutes}",
        r"12\text{ cm by }5\text{ cm}",
        "Since 3 divides n, n is even",
        "for all n that 3 divides",
        "",
        " ",
        "$",
        "{",
        r"\frac{1}{",
        r"\boxed{",
        r"\boxed{}",
        r"so \boxed{7}. Hmm \boxed{",
        "nan(",
        "x \\",
        "####",
        float("nan"),
        float("inf"),
        None,
        ["7"],
        {"a": "7"},
        b"7",
        r"k\pi + \frac{\pi}{4}, k \in \mathbb{Z}",
    ],
)
def test_what_cannot_be_read_is_no_reference_and_gives_no_score(gold):
    assert unreadable([gold, "7"]) == [0]
    first = str(gold).partition(" ")[0]
    assert verify_all([(rf"\boxed{{{first}}}", gold), (r"\boxed{3}", gold)]) == [None, None]


@pytest.mark.parametrize("gold", [72, -3, 0, 1450, 7.0, 0.25, 1e-05, 2.5e22, True])
def test_numbers_need_no_text(gold):
    box = str(gold).replace("e-05", r"\times 10^{-5}").replace("e+22", r"\times 10^{22}")
    assert verify_one(rf"\boxed{{{box}}}", gold) == 1
    assert verify_one(r"\boxed{31}", gold) == 0
    assert not unreadable([gold])


# the answer is 12, and 13 is wrong
BOXES = [
    (r"\boxed{12}", 1),
    (r"$\boxed{12}$", 1),
    (r"\[\boxed{12}\]", 1),
    (r"\boxed {12}", 1),
    ("\\boxed{\n12\n}", 1),
    (r"\boxed{12.}", 1),
    (r"\boxed{\boxed{12}}", 1),
    (r"\boxed{x=12}", 1),
    (r"\boxed{12\text{ cm}}", 1),
    (r"\boxed{12 dollars}", 1),
    (r"\boxed{\frac{24}2}", 1),
    (r"\boxed{13}. No: \boxed{12}", 1),
    (r"\boxed{13}, wait: \boxed{12}", 1),
    (r"first \boxed{13} then, after long thought, I am sure that it is \boxed{12}", 1),
    (r"\boxed{12}, \boxed{12}", 1),
    (r"\boxed{12}}}", 1),
    ("\\boxed{12}\\", 1),
    (r"The answer is $12$.", 1),
    # cut off, unbalanced, empty, hedged
    (r"\boxed{12}. Hmm, wait. \boxed{", 0),
    (r"\boxed{12} \boxed{1", 0),
    (r"\boxed{12} or is it \boxed{13", 0),
    (r"\boxed{12} \boxed", 0),
    (r"\boxed{12} \bo", 0),
    (r"\boxed{12}. So \boxe", 0),
    (r"\boxed{12} \b", 0),
    (r"\boxed{12}, then \boxed{\frac{1}{", 0),
    (r"\boxed{12", 0),
    (r"\boxed{{12}", 0),
    (r"\boxed{12\}", 0),
    (r"\boxed{\frac{12}{1}", 0),
    (r"\boxed{\boxed{12}", 0),
    (r"\boxed{}", 0),
    (r"\boxed{ }", 0),
    (r"\boxed{12}. So \boxed{}", 0),
    (r"The answer is $12$. So \boxed{", 0),
    (r"\boxed{12}, \boxed{13}", 0),
    (r"\boxed{12}\boxed{13}", 0),
    (r"\boxed{12} \text{ or } \boxed{13}", 0),
    (r"\boxed{12}. No: \boxed{13}", 0),
    (r"\boxed12", 0),
    ("12", 0),
    ("**12**", 0),
    ("The answer is 12.", 0),
    ("", 0),
    ("\\boxed{" * 200, 0),
    ("\\boxed{12}" + "\\boxed{" * 200, 0),
    ("{" * 200 + r"\boxed{12", 0),
    (r"\boxed", 0),
    ("\\", 0),
    (r"\boxed{3 hours 12 minutes}", 0),
]


@pytest.mark.parametrize(("completion", "score"), BOXES, ids=[repr(b[0])[:50] for b in BOXES])
def test_the_last_whole_box_counts_and_a_cut_off_one_is_no_answer(completion, score):
    assert verify_one(completion, "12") == score
    assert verify_one(completion, 12) == score
    assert verify_one(completion, "$12$") == score


def test_boxes_side_by_side_are_one_answer():
    for text in (
        r"\boxed{2} and \boxed{3}",
        r"$\boxed{2}$, $\boxed{3}$",
        r"\boxed{2}\text{ or }\boxed{3}",
        r"\boxed{3}, \boxed{2}",
    ):
        assert verify_one(text, r"\{2, 3\}") == 1
        assert verify_one(text, "2") == verify_one(text, "3") == 0


def test_small_numbers_differ_by_their_digits():
    """math-verify compares to six decimal places, so that all of these were equal."""
    for gold, wrong in (("0.0000001", "0.0000002"), (r"6.6\times 10^{-34}", r"9\times 10^{-34}"), ("1e-9", "3e-9")):
        assert verify_one(rf"\boxed{{{gold}}}", gold) == 1
        assert verify_one(rf"\boxed{{{wrong}}}", gold) == 0
    assert verify_one(r"\boxed{0.333333}", r"\frac{1}{3}") == 1
    assert verify_one(r"\boxed{0.33333}", r"\frac{1}{3}") == 0


def test_plain_numbers_are_known_as_readable_without_a_process():
    started = time.monotonic()
    rows = [str(i) for i in range(20_000)] + ["so 3 and\n#### 1,450", "-2.5", "50%", 7]
    assert unreadable(rows) == []
    assert time.monotonic() - started < 2
    assert all(reference(row) for row in rows[-4:])


def test_many_references_are_read_by_all_processors():
    rows = [rf"{i}\sqrt{{3}}" for i in range(220)]
    rows[7] = rows[210] = "3 hours 20 minutes"
    assert unreadable(rows) == [7, 210]


def test_reading_takes_no_time_on_long_texts():
    started = time.monotonic()
    for text in (
        r"\boxed{12}" * 5000,
        "\\boxed{" * 20_000,
        "a b " * 20_000,
        " " * 100_000 + r"\text{a}",
        "{" * 100_000,
        r"\text{" * 20_000,
        "1 " * 50_000,
        r"1\text{a}" * 5000,
        "and" * 30_000,
        r"\boxed{1} and " * 5000,
    ):
        boxed_answer(text)
        boxed_answer(rf"\boxed{{{text}}}")
        as_latex(text)
        reference(text)
    assert time.monotonic() - started < 20


STATED = [  # (completion, answers that it states, answers that it does not state)
    ("So the answer is 73.", ["73"], ["7", "3"]),
    ("**73**", ["73"], ["72"]),
    ("The final answer is: $\\frac{1}{2}$.", ["0.5", r"\frac12"], ["1", "2"]),
    ("Final Answer: The final answer is 7. I hope it is correct.", ["7"], ["1"]),
    ("**Answer:** (-1, 2)", ["(-1, 2)"], ["-1", "2"]),
    ("The answer is \\(12\\), since 3 x 4 = 12", ["12"], ["3", "4"]),
    ("answer is therefore 5", ["5"], ["6"]),
    ("4 x 350 = 1,400\n#### 1,450", ["1450"], ["1400", "4"]),
    ("We get $x=3$, and so $x+1=4$", ["x+1=4"], ["x+1=5"]),
    ("So we have\n\\[\nx = 12\n\\]", ["12"], ["13"]),
    ("So we have $$12$$ of 13", ["12"], ["13"]),
    ("It was 3.5, and is 4.25 now", ["4.25", "17/4"], ["3.5", "25"]),
    ("It is -3", ["-3"], ["3"]),
    ("50%", ["50%", "0.5"], ["5"]),
    ("The answer is 12. In a box: \\boxed{13}", ["13"], ["12"]),
    ("The answer is 18 dollars.", ["18"], ["17"]),
    ("The final answer is:\n\n\\[\n\\frac{1}{2}\n\\]\n", ["0.5"], ["1", "2"]),
    ("The answer is: $$\n42\n$$ as 6 x 7 is.", ["42"], ["7", "6"]),
    ("I do not know", [], ["0", "1"]),
    ("\\boxed{12}. Hmm, wait. \\boxed{", [], ["12"]),
    ("The answer is 12, in a box: \\box", [], ["12"]),
]


@pytest.mark.parametrize(("completion", "right", "wrong"), STATED)
def test_the_lenient_reading(completion, right, wrong):
    pairs = [(completion, answer) for answer in [*right, *wrong]]
    assert verify_all(pairs, lenient=True) == [1.0] * len(right) + [0.0] * len(wrong)
    if r"\box" in completion:
        assert stated_answer(completion) == boxed_answer(completion)
    elif right:
        assert verify_all(pairs)[: len(right)] == [0.0] * len(right) or "nswer" in completion


@pytest.mark.parametrize("text", ["answer is ", "**1", "$", "1,", "(", "* ", "answer", "answer is (", "#### ", "\\("])
def test_the_lenient_reading_takes_linear_time(text):
    began = time.process_time()
    stated_answer(text * (200_000 // len(text)))
    assert time.process_time() - began < 2
