"""mean@k, pass@k and maj@k with their intervals, and the answers that samples vote by."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from bandpo._system.errors import RunError
from bandpo.train.evaluate import Evaluation
from bandpo.train.measures import Tally, by_prompt, differences, estimates, majority_at_k, sizes, tally
from bandpo.train.votes import merged, voter_of

NAN = math.nan


def enumerated(votes, n, k):
    """maj@k by its definition: every subset of k samples, every most frequent answer in it."""
    labels = [i for i, (count, _) in enumerate(votes) for _ in range(count)]
    labels += [None] * (n - len(labels))
    total, subsets = 0.0, list(itertools.combinations(labels, k))
    for subset in subsets:
        counts = {a: subset.count(a) for a in subset if a is not None}
        winners = [a for a in counts if counts[a] == max(counts.values())]
        total += sum(votes[a][1] for a in winners) / len(winners) if winners else 0.0
    return total / len(subsets)


def test_majority_is_that_of_all_subsets():
    draw = random.Random(0)
    for _ in range(150):
        n = draw.randint(1, 9)
        votes, left = [], n
        while left and draw.random() < 0.85:
            votes.append((draw.randint(1, left), draw.choice([0.0, 1.0, 0.5])))
            left -= votes[-1][0]
        for k in range(1, n + 1):
            assert majority_at_k(votes, n, k) == pytest.approx(enumerated(votes, n, k), abs=1e-12), (votes, n, k)


@pytest.mark.parametrize(
    ("votes", "n", "k", "expected"),
    [
        ([(3, 1.0), (2, 0.0)], 5, 5, 1.0),
        ([(2, 1.0), (2, 0.0), (1, 0.0)], 5, 5, 0.5),  # a tie is decided by chance
        ([(1, 1.0), (1, 0.0), (1, 0.0)], 8, 8, 1 / 3),  # five samples do not vote
        ([], 4, 4, 0.0),
        ([], 4, 2, 0.0),
        ([(4, 1.0)], 8, 1, 0.5),
        ([(4, 1.0)], 8, 4, 1 - 1 / 70),  # all four drawn without an answer: C(4, 4) of C(8, 4)
        ([(8, 1.0)], 8, 4, 1.0),
    ],
)
def test_majority_by_hand(votes, n, k, expected):
    assert majority_at_k(votes, n, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_one_vote_is_the_share_that_is_right_and_large_numbers_stay_exact():
    assert majority_at_k([(300, 1.0), (500, 0.0), (7, 1.0)], 1024, 1) == pytest.approx(307 / 1024, abs=1e-12)
    # With two answers and k odd there is no tie: a hypergeometric tail.
    exact = stats.hypergeom.sf(16, 2000, 900, 33)
    assert majority_at_k([(1100, 0.0), (900, 1.0)], 2000, 33) == pytest.approx(exact, rel=1e-10)
    for arguments in (([(1, 1.0)], 4, 0), ([(1, 1.0)], 4, 5), ([(5, 1.0)], 4, 2)):
        with pytest.raises(ValueError, match="majority_at_k"):
            majority_at_k(*arguments)


def test_pass_at_k_is_the_hypergeometric_one_and_samples_without_a_score_are_left_out():
    tallies = [Tally(c / 6, 6, c) for c in range(7)] + [Tally(0.5, 4, 2), Tally(NAN, 0, 0)]
    found = by_prompt(tallies, 6)
    assert list(found) == ["mean@6", "pass@1", "pass@2", "pass@4", "pass@6"] and sizes(6) == [1, 2, 4, 6]
    for k in sizes(6):
        expected = [1 - stats.hypergeom.pmf(0, 6, c, k) for c in range(7)]
        assert found[f"pass@{k}"][:7] == pytest.approx(expected, abs=1e-12)
    assert found["pass@4"][7] == 1.0 and math.isnan(found["pass@6"][7])
    assert all(math.isnan(each[8]) for each in found.values())
    assert found["mean@6"][:8] == found["pass@1"][:8]  # to the last digit, so that their intervals agree


def test_a_tally_counts_answers_of_scored_samples():
    found = tally([1.0, 0.0, NAN, 0.2, 1.0], ["7", "8", "7", None, "7"])
    assert (found.samples, found.right, found.votes) == (4, 2, ((2, 1.0), (1, 0.0)))
    assert found.mean == pytest.approx(0.55)
    assert tally([0.5, 0.49]).right == 1 and tally([0.5]).votes is None
    assert math.isnan(tally([NAN]).mean) and tally([NAN], ["7"]).votes == ()


def test_intervals_are_bootstraps_of_the_prompts():
    values = [0.0, 0.125, 1.0, 0.5, 0.25, 0.75, 0.0, 0.375]
    done = stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0), vectorized=True
    )
    found = estimates({"mean@8": [*values, NAN], "few": [0.0, 1.0], "none": [NAN], "same": [0.25] * 5})
    assert found["mean@8"] == pytest.approx((np.mean(values), *done.confidence_interval), abs=1e-12)
    assert found["few"].value == 0.5 and math.isnan(found["few"].low)
    assert math.isnan(found["none"].value) and found["same"] == (0.25, 0.25, 0.25)


def test_differences_are_paired_by_prompt():
    first, other = {"mean@2": [0.0, 0.5, 1.0, NAN]}, {"mean@2": [0.5, 1.0, 1.0, 1.0], "maj@2": [1.0] * 4}
    change = differences(first, other)
    assert list(change) == ["mean@2"] and change["mean@2"].value == pytest.approx(1 / 3)
    assert differences(other, first)["mean@2"].value == pytest.approx(-1 / 3)
    # A constant change has no noise, however much the prompts differ.
    assert differences({"m": [0.0, 0.3, 0.6]}, {"m": [0.25, 0.55, 0.85]})["m"].high < 0.26
    with pytest.raises(ValueError, match="3 and 2 prompts cannot be paired"):
        differences({"m": [0.0] * 3}, {"m": [0.0] * 2})


def test_an_evaluation_has_the_majority_from_three_samples_on(tmp_path):
    rewards = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, NAN]]
    answers = [["7", "8", "7", "9"], ["1", "1", "2", "2"]]
    found = Evaluation(["a", "b"], [["x"] * 4] * 2, rewards, answers)
    assert found.summary()["maj@4"] == 1.0  # the second prompt has three scores, too few for maj@4
    rewards[1][3] = 1.0
    assert found.summary()["maj@4"] == 0.75
    found.write(tmp_path / "samples.jsonl", "after")
    assert Evaluation.read(tmp_path / "samples.jsonl", "after") == found
    without = Evaluation(["a", "b"], [["x"] * 4] * 2, rewards)
    without.write(tmp_path / "samples.jsonl", "after")  # as older versions wrote it
    assert Evaluation.read(tmp_path / "samples.jsonl", "after") == without
    assert list(without.summary()) == ["mean@4", "pass@1", "pass@2", "pass@4", "groups with signal", "unscored"]
    two = Evaluation(["a"], [["x"] * 2], [[1.0, 0.0]], [["7", "8"]])
    assert not any(name.startswith("maj") for name in two.summary())


def test_the_answers_of_tasks_are_those_that_are_scored():
    sums, countdown = voter_of("sums", None), voter_of("countdown", None)
    row = {"metadata": '{"expression": "12 + 3"}'}
    assert [sums(text, row) for text in (" 15", "12 + 3 = 15", "1 + 2 = 3", " ")] == ["15", "15", "1+2=3", None]
    assert [countdown(text, {"metadata": "{}"}) for text in ("7 - 4", "7-4", "")] == ["7-4", "7-4", None]


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        (r"so \boxed{12}", r"\boxed{12}", r"\boxed{12}"),
        (r"\boxed{12}", r"\boxed{12}", r"\boxed{12}"),
        (r"\boxed{12}, wait \boxed{", None, None),
        ("The answer is 7.", None, r"\boxed{7}"),
        ("The answer is $7$.", r"\boxed{7}", r"\boxed{7}"),
        ("I do not know", None, None),
        ("", None, None),
    ],
)
def test_the_answers_of_math(completion, strict, lenient):
    assert voter_of("math", None)(completion, {}) == strict
    assert voter_of("math-lenient", None)(completion, {}) == lenient


def test_the_answers_of_a_reward_of_a_user():
    def score(completions, **_):
        return [0.0 for _ in completions]

    assert voter_of("mine:score", score) is None
    score.answer_of = lambda text: int(text) if text else None
    voter = voter_of("mine:score", score)
    assert voter("07", {}) == "7" and voter("", {}) is None
    with pytest.raises(RunError, match=r"'mine:score': its answer_of raised ValueError.* at .*test_measures.py"):
        voter("x", {})
    score.answer_of = "7"
    with pytest.raises(ValueError, match="answer_of must be a function"):
        voter_of("mine:score", score)


def test_equal_answers_of_math_are_one():
    boxes = [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"\boxed{.5}", r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{7}", None]
    (found,) = merged([boxes], [[0.0] * 7], workers=1)
    assert found[0] == found[1] == found[2] and found[3] == found[4] and found[6] is None
    assert len(set(found)) == 4
    # What is right equals the reference, however it is written; two wrong numbers are compared without math-verify.
    numbers = [[r"\boxed{1,450}", r"\boxed{1450.0}", r"\boxed{3}", None, r"\boxed{3.0}"]]
    assert [len(set(own)) for own in merged(numbers, [[1.0, 1.0, 0.0, 1.0, 0.0]], workers=1)] == [2]
    assert merged([["a", "b"]], [[1.0, 0.0]], workers=1)[0][1] == "b"
    assert merged([[]], [[]]) == [[]]
