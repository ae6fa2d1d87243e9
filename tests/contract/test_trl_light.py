"""What our trainer does beside TRL's loss: basic metrics without the terms, the full ones every n-th step, no early reads."""

import math
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import Band, Objective, RatioBounds, policy_metrics
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer, nonfinite
from bandpo.integrations.trl.nonfinite import without_nonfinite
from bandpo.metrics import policy_sums
from bandpo.train.grpo import _Trainer
from trl_runs import (
    joined,
    log_of,
    loss_and_gradient,
    reward,
    rollout,
    settings,
    token_logprobs,
    trl_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
FULL = ("outside_fraction/any", "token_fraction_by_prob/>=0.99", "band/upper_mean", "band/divergence_max")


@pytest.fixture
def make(make_model, tokenizer, prompts, tmp_path):
    def made(cls=BandGRPOTrainer, objective="bandpo-kl", own=None, **changes):
        args = BandGRPOConfig(**settings(tmp_path, objective=objective if own is None else "dapo", **changes))
        return cls(model=make_model(), reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer,
                   objective=own)  # fmt: skip

    return made


# ---- the basic metrics without the terms


def nan_edges(old_logprobs):
    edge = torch.where(old_logprobs < -4, math.nan, 0.3)
    return RatioBounds(1 - edge, 1 + edge)


def strange(inputs, new, kind):
    inputs, new = {k: v.clone() for k, v in inputs.items()}, new.clone()
    if kind == "holes":
        inputs["tool_mask"] = (torch.arange(6) != 1).long().expand(8, 6)
    if kind == "nothing valid":
        inputs["completion_mask"].zero_()
    if kind == "no numbers":
        new[0, 0], new[1, 1], new[2, 5] = math.nan, -math.inf, math.nan
        inputs["old_per_token_logps"][0, 1:3] = -math.inf
    if kind == "impossible":
        new[0, 0] = inputs["old_per_token_logps"][0, 0] = torch.finfo(torch.float32).min
    if kind == "held":
        inputs["old_per_token_logps"][0] = -90.0
    if kind == "no advantage":
        inputs["advantages"][3] = math.nan
    if kind == "on policy":
        del inputs["old_per_token_logps"]
    return inputs, new


KINDS = ["usual", "holes", "nothing valid", "no numbers", "impossible", "held", "no advantage", "on policy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dapo", "bandpo-kl", "bandpo-tv", "dcpo", "gspo", "own"])
def test_basic_sums_are_those_of_the_terms(name, kind, make, tokenizer):
    own = Objective(bounds=nan_edges, name="own", aggregation="token-mean") if name == "own" else None
    trainer = make(objective=name, own=own)
    trainer.model.train()
    plain = rollout(tokenizer)
    inputs, new = strange(plain, token_logprobs(trainer.model, plain).detach(), kind)
    strategy = trainer._strategy
    given = strategy.given_to_trl(inputs)
    want = policy_sums(strategy.terms(trainer.model, new, inputs, given), detail="basic")
    assert (want["nonfinite_fraction"].numerator > 0) == (
        kind in ("no numbers", "impossible", "no advantage")
        or (name == "own" and kind not in ("nothing valid", "on policy"))
    ) or kind == "on policy"
    for processes in (1, 2):
        trainer.accelerator = mock.Mock(num_processes=processes)
        scored = without_nonfinite(new, dict(inputs), trainer.objective.ratio_level)
        found = strategy.basic_sums(scored, inputs, given)
        if found is None:
            assert (name, kind) in (("own", "on policy"), ("dcpo", "on policy"))
            continue
        clips = {n for n in want if n.startswith("clip_fraction/")}
        basic = {n for n in want if not n.startswith(("band/", "outside_", "token_fraction_", "clip_fraction_by_"))}
        assert basic - set(found) == (clips if processes == 1 and scored.silent is None else set())
        for key, (numerator, denominator, _) in found.items():
            assert torch.equal(numerator.double(), want[key].numerator.double()), key
            assert torch.equal(denominator.double(), want[key].denominator.double()), key


@pytest.mark.parametrize("objective", ["bandpo-kl", "gspo"])
def test_what_the_host_has_seen_changes_nothing(objective, make, tokenizer, monkeypatch):
    """On an accelerator nothing is read: the tensors are replaced, by equal ones where nothing is strange."""
    trainer, inputs = make(objective=objective, full_metrics_every=0, beta=0.0), rollout(tokenizer)
    seen = loss_and_gradient(trainer, inputs)
    monkeypatch.setattr(nonfinite, "_all_usual", lambda *_: False)
    unseen = loss_and_gradient(trainer, inputs)
    assert torch.equal(seen[0], unseen[0]) and torch.equal(seen[1], unseen[1]) and seen[2] == unseen[2]


def test_log_probs_that_count_as_infinite_are_not_usual():
    lowest = torch.full((1, 1), torch.finfo(torch.float32).min)
    for new, old in ((lowest, lowest), (lowest, -torch.ones(1, 1)), (-torch.ones(1, 1) * 1e9, -torch.ones(1, 1) * 1e9)):
        batch = {"old_per_token_logps": old, "advantages": torch.ones(1), "completion_mask": torch.ones(1, 1)}
        assert without_nonfinite(new, batch, "token").strange is not None


# ---- nothing is read, and little is computed


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def reads():
    """Counts what makes the host wait for a device: each of these methods of a tensor."""
    counts = Counter()

    def counted(name, method):
        def call(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        return call

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
    with mock.patch.multiple(torch.Tensor, **{n: counted(n, getattr(torch.Tensor, n)) for n in names}):
        yield counts


@pytest.mark.parametrize("objective", ["dapo", "bandpo-kl", "gspo"])
def test_a_micro_batch_reads_nothing_that_trl_does_not_read(objective, make, make_model, tokenizer, prompts, tmp_path,
                                                            monkeypatch):  # fmt: skip
    """Of the trainer of `bandpo train`, which keeps the last batch too, as on an accelerator."""
    monkeypatch.setattr(nonfinite, "_all_usual", lambda *_: False)
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts)
    ours = make(_Trainer, objective=objective, full_metrics_every=0)
    found = []
    for trainer in (theirs, ours):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, rollout(tokenizer)).backward()
        with reads() as counts:
            trainer._compute_loss(trainer.model, rollout(tokenizer)).backward()
        found.append(counts)
    flag = Counter({"__bool__": 1} if objective == "gspo" else {})
    assert found[0]["item"] > 0 and found[1] == found[0] + flag


@pytest.mark.parametrize(("objective", "more"), [("dapo", 40), ("bandpo-kl", 100), ("gspo", 50)])
def test_a_basic_micro_batch_adds_few_operations(objective, more, make, make_model, tokenizer, prompts, tmp_path):
    """Those of bandpo-kl are mostly its bounds, which a rollout of its own brings along."""
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts)
    ours, counts = make(objective=objective, full_metrics_every=0), []
    for trainer in (theirs, ours):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        with Operations() as operations:
            trainer._compute_loss(trainer.model, rollout(tokenizer))
        counts.append(operations.count)
    assert counts[1] - counts[0] <= more
    if objective == "bandpo-kl":
        inputs = rollout(tokenizer)
        inputs |= ours._strategy.of_rollout(inputs)
        with Operations() as operations:
            ours._compute_loss(ours.model, inputs)
        assert operations.count - counts[0] <= 40


# ---- bounds of a rollout


def test_the_bounds_of_a_rollout_are_used_until_the_region_changes(make, tokenizer):
    trainer, inputs = make(), rollout(tokenizer)
    with_bounds = inputs | trainer._strategy.of_rollout(inputs)
    assert "bandpo_lower" in with_bounds
    want, found = loss_and_gradient(trainer, inputs), loss_and_gradient(trainer, with_bounds)
    assert torch.equal(want[0], found[0]) and torch.equal(want[1], found[1])
    trainer.objective = trainer.objective.with_radius(0.5)
    want, found = loss_and_gradient(trainer, inputs), loss_and_gradient(trainer, with_bounds)
    assert torch.equal(want[0], found[0]) and torch.equal(want[1], found[1])
    moving = make(radius_schedule="linear", radius_end=0.01)
    assert moving._strategy.of_rollout(inputs) == {}


# ---- full_metrics_every


def rows_of(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("objective", ["bandpo-kl", "cispo"])
def test_the_full_metrics_of_every_third_step(objective, make):
    common = {"objective": objective, "max_steps": 8, "logging_steps": 2, "gradient_accumulation_steps": 2}
    every, third, never = (rows_of(make(full_metrics_every=n, **common)) for n in (1, 3, 0))
    names = [name for name in FULL if name in every[0]]
    assert len(names) >= 2
    for name in names:
        assert [name in row for row in third] == [True, True, False, True]  # of steps 0, 3 and 6
        assert not any(name in row for row in never) and all(name in row for row in every)
    for row, full, none in zip(third, every, never, strict=True):
        assert all(x is not None and x == x for x in row.values())
        same = [k for k in none if not k.endswith(("_time", "_runtime"))]
        assert "ratio/mean" in same and "clip_ratio/region_mean" in same
        assert [row[k] for k in same] == [full[k] for k in same] == [none[k] for k in same]


def test_a_column_is_the_mean_over_the_steps_that_measured_it(make):
    trainer, kept = make(full_metrics_every=3, max_steps=4, logging_steps=4, gradient_accumulation_steps=2), []
    trainer._after_loss = lambda logprobs, inputs, given, terms: kept.append(terms)
    (row,) = rows_of(trainer)
    measured = [terms is not None for terms in kept]
    assert measured == [True] * 2 + [False] * 4 + [True] * 2  # all micro-batches of a step alike
    want = policy_metrics(joined([terms for terms in kept if terms is not None]))
    for name in FULL:
        assert row[name] == pytest.approx(want[name].item(), rel=1e-5, abs=1e-6), name
    assert row["ratio/mean"] != pytest.approx(want["ratio/mean"].item(), rel=1e-4)


def test_a_radius_that_follows_a_metric_is_measured_at_every_step(make):
    common = {"radius_target": "outside_fraction=0.01", "max_steps": 6}
    every, tenth = (rows_of(make(full_metrics_every=n, **common)) for n in (1, 10))
    assert len({row["band/radius"] for row in every}) > 1
    assert [row["band/radius"] for row in tenth] == [row["band/radius"] for row in every]


@pytest.mark.parametrize("value", [-1, 2.5, True, None])
def test_other_numbers_of_steps_are_refused(value, tmp_path):
    with pytest.raises((TypeError, ValueError), match="full_metrics_every"):
        BandGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, full_metrics_every=value)


def test_evaluation_measures_in_full_unless_nothing_does(make, tokenizer):
    for every, there in ((10, True), (0, False)):
        trainer = make(full_metrics_every=every)
        trainer.state.global_step = 3
        trainer.model.eval()
        trainer._compute_loss(trainer.model, rollout(tokenizer))
        trainer.settle()
        assert ("band/upper_mean" in trainer._metrics["eval"]) == there


# ---- what `bandpo train` keeps


@pytest.mark.parametrize("objective", ["bandpo-kl", "gspo", "cispo"])
def test_the_last_batch_is_kept_by_reference(objective, make, tokenizer):
    trainer, inputs = make(_Trainer, objective=objective, full_metrics_every=0), rollout(tokenizer)
    assert trainer.last_batch == {}
    new = token_logprobs(trainer.model, inputs).detach()
    loss_and_gradient(trainer, rollout(tokenizer, seed=1))
    loss_and_gradient(trainer, inputs)
    batch, on = trainer.last_batch, inputs["completion_mask"] != 0
    torch.testing.assert_close(batch["logprobs"], new.masked_fill(~on, 0.0))
    assert torch.equal(batch["old_logprobs"], inputs["old_per_token_logps"].masked_fill(~on, 0.0))
    assert torch.equal(batch["advantages"], inputs["advantages"].unsqueeze(1).expand(8, 6))
    assert torch.equal(batch["mask"], on)


@pytest.mark.parametrize("every", [0, 1])
def test_tokens_of_the_figure(every, make, tokenizer):
    trainer, inputs = make(_Trainer, full_metrics_every=every), rollout(tokenizer)
    assert trainer.tokens == {"p": [], "ratio": [], "clipped": []}
    loss_and_gradient(trainer, inputs)
    on, tokens = inputs["completion_mask"] != 0, trainer.tokens
    assert sorted(tokens["p"]) == pytest.approx(sorted(inputs["old_per_token_logps"][on].exp().tolist()), rel=1e-5)
    share = log_of(trainer)["clip_ratio/region_mean"][0]
    assert sum(tokens["clipped"]) / len(tokens["p"]) == pytest.approx(share, abs=1e-6) and share > 0
    assert tokens == trainer.tokens  # the same draw
    assert isinstance(trainer.objective.bounds, Band)
