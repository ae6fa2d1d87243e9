"""Learning problems as tensors: prompts of one length, demonstrations for the warm-up, and a verifiable reward.

`paths` and `addition` are built so that a rare way is the better one; the others are the tasks of `bandpo.toy.tasks`. Training
and held-out prompts never share a problem.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from bandpo.toy.models import build_tokenizer
from bandpo.toy.tasks import TASKS, make_splits, score

PAD, END, FIRST = 0, 1, 3
"""Token ids of `bandpo.toy.models.build_tokenizer`: padding, end of a completion, and the first character."""

VOCABULARY = 98
"""Number of tokens of that tokenizer."""

_HELD_OUT = 192  # held-out prompts of every problem
_WALKS = 60_000  # random walks from which the demonstrations of `paths` come
_SUMS = 16_000  # random pairs of numbers of `addition`
_WIDEST = 26  # characters of a prompt: a few long ones of letter_counting would make all others long


@dataclass(frozen=True)
class Problem:
    """Prompts, demonstrations and a reward.

    Args:
        name: Name for tables.
        description: Description in one line.
        prompts: `(count, width)` tokens of the training prompts.
        held_out: `(count, width)` tokens of the evaluation's prompts.
        demonstrations: `(count, width + length)` tokens of prompts and completions for the warm-up, padded with PAD.
        length: Number of tokens of the longest completion, with its end token.
        reward: Function of the prompt's tokens and the completion's tokens before END; 0 or 1.
        text: Function that turns tokens into text for people.
        warm_up_steps: Supervised steps after which most groups have a signal.
    """

    name: str
    description: str
    prompts: Tensor
    held_out: Tensor
    demonstrations: Tensor
    length: int
    reward: Callable[[tuple[int, ...], tuple[int, ...]], float]
    text: Callable[[list[int]], str]
    warm_up_steps: int

    def rewards(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The rewards of completions; a completion without an end token has reward 0.

        Args:
            prompts: `(count, width)` tokens.
            completions: `(count, length)` tokens.

        Returns:
            `(count,)`, float32, on the device of the completions. The rewards are computed by the host.
        """
        asked, answers = (cast("list[list[int]]", x.tolist()) for x in (prompts, completions))
        found = [
            self.reward(tuple(p), tuple(c[: c.index(END)])) if END in c else 0.0
            for p, c in zip(asked, answers, strict=True)
        ]
        return torch.tensor(found, device=completions.device)

    def to(self, device: torch.device) -> "Problem":
        """The problem with its tensors on a device.

        Args:
            device: The device.
        """
        if self.prompts.device == device:
            return self
        tensors = {name: getattr(self, name).to(device) for name in ("prompts", "held_out", "demonstrations")}
        return replace(self, **tensors)


@lru_cache
def paths(nodes: int = 64, degree: int = 4, seed: int = 0) -> Problem:
    """Walks from one node of a random graph to another, where the demonstrations rarely use some of the edges.

    A prompt is start and goal, a completion the nodes after the start. The demonstrations are random walks whose edges have
    probabilities 1, 1/4, 1/9, 1/16 (normalised), so that most short ways use an edge that is unlikely in the warmed-up model.

    Args:
        nodes: Number of nodes.
        degree: Number of edges of each node.
        seed: Seed of the graph and of the walks.

    Returns:
        The problem.
    """
    draw = random.Random(seed)
    edges = [draw.sample([j for j in range(nodes) if j != i], degree) for i in range(nodes)]
    weights = [1 / (k + 1) ** 2 for k in range(degree)]
    longest = 6
    walks: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for _ in range(_WALKS):
        walk = [draw.randrange(nodes)]
        for _ in range(draw.randint(2, longest)):
            walk.append(draw.choices(edges[walk[-1]], weights)[0])
        if walk[0] != walk[-1] and walk[-1] not in walk[1:-1]:
            walks.setdefault((walk[0], walk[-1]), []).append(tuple(walk[1:]))
    pairs = sorted(walks)
    draw.shuffle(pairs)
    held_out, train = pairs[:_HELD_OUT], pairs[_HELD_OUT:]
    demonstrations = [(*pair, *walk, END) for pair in train for walk in walks[pair]]

    def reward(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        here, goal = (t - FIRST for t in prompt)
        for token in completion:
            if token - FIRST not in edges[here]:
                return 0.0
            here = token - FIRST
        return float(bool(completion) and here == goal)

    return Problem(
        name="paths",
        description=f"reach a node of a {nodes}-node graph, edges of heavy-tailed probability",
        prompts=torch.tensor(train) + FIRST,
        held_out=torch.tensor(held_out) + FIRST,
        demonstrations=_pad([[t + FIRST for t in d[:-1]] + [END] for d in demonstrations]),
        length=longest + 2,
        reward=reward,
        text=lambda tokens: "→".join(str(t - FIRST) for t in tokens if t >= FIRST),
        warm_up_steps=600,
    )


@lru_cache
def addition(rare: float = 0.02, right: float = 0.4, seed: int = 0) -> Problem:
    """Sums of two three-digit numbers, written directly or digit by digit from the right.

    Most demonstrations are direct sums (`=579`) of which only a share is right; a few are sums with a mark and reversed digits
    (`<975`), which are always right and easy to compute. The first is a common weak strategy, the second a rare strong one.

    Args:
        rare: Share of demonstrations of the strong strategy.
        right: Share of direct sums that are right.
        seed: Seed of the numbers and demonstrations.

    Returns:
        The problem.
    """
    draw = random.Random(seed)
    numbers = list({(draw.randint(100, 999), draw.randint(100, 999)) for _ in range(_SUMS)})
    numbers.sort()
    draw.shuffle(numbers)
    held_out, train = numbers[:_HELD_OUT], numbers[_HELD_OUT:]
    demonstrations: list[str] = []
    for a, b in train:
        total = a + b
        if draw.random() < rare:
            demonstrations.append(f"{a}+{b}<{str(total)[::-1]}")
        else:
            wrong = total + draw.choice([-1, 1]) * draw.choice([1, 10, 100])
            demonstrations.append(f"{a}+{b}={total if draw.random() < right else wrong}")

    def reward(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        a, b = _decode(prompt).split("+")
        answer = _decode(completion)
        total = str(int(a) + int(b))
        return float(answer in (f"={total}", f"<{total[::-1]}"))

    return Problem(
        name="addition",
        description=f"three-digit sums, {rare:.0%} of demonstrations by the strategy that works",
        prompts=torch.tensor([_encode(f"{a}+{b}") for a, b in train]),
        held_out=torch.tensor([_encode(f"{a}+{b}") for a, b in held_out]),
        demonstrations=_pad([[*_encode(d), END] for d in demonstrations]),
        length=6,
        reward=reward,
        text=lambda tokens: _decode(tuple(tokens)),
        warm_up_steps=1500,
    )


@lru_cache
def reasoning(task: str) -> Problem:
    """A task of `bandpo.toy.tasks`, with prompts that are filled up with spaces on the left to one length."""
    chosen = TASKS[task]
    train, held_out = make_splits(chosen, None, _HELD_OUT)
    widest = min(_WIDEST, max(len(row["prompt"]) for row in [*train, *held_out]))
    known = set(_characters()[0])
    train, held_out = (
        [r for r in rows if len(r["prompt"]) <= widest and known.issuperset(r["prompt"])] for rows in (train, held_out)
    )
    metadata = {r["prompt"]: r["metadata"] for r in [*train, *held_out]}

    def reward(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        problem, answer = _decode(prompt).lstrip(), _decode(completion)
        if task == "countdown":
            return _countdown(problem, answer)
        return score(task, answer, metadata[problem])

    return Problem(
        name=task,
        description=chosen.description,
        prompts=torch.tensor([_encode(r["prompt"].rjust(widest)) for r in train]),
        held_out=torch.tensor([_encode(r["prompt"].rjust(widest)) for r in held_out]),
        demonstrations=_pad([[*_encode(r["prompt"].rjust(widest) + r["answer"]), END] for r in train]),
        length=chosen.max_completion_length,
        reward=reward,
        text=lambda tokens: _decode(tuple(tokens)).lstrip(),
        warm_up_steps=250,
    )


PROBLEMS: Mapping[str, Callable[[], Problem]] = MappingProxyType(
    {"paths": paths, "addition": addition, **{name: (lambda name=name: reasoning(name)) for name in TASKS}}
)
"""The learning problems by name; calling one makes it."""

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "paths": "reach a node of a 64-node graph, edges of heavy-tailed probability",
        "addition": "three-digit sums, 2% of demonstrations by the strategy that works",
        **{name: task.description for name, task in TASKS.items()},
    }
)
"""The description of each problem, for pages: making `paths` takes more than a second."""


@lru_cache(maxsize=200_000)
def _countdown(problem: str, answer: str) -> float:
    """The score of reasoning-gym for a sum without brackets (tests/lab/test_problems.py), a thousand times faster."""
    numbers, target = problem.rstrip(":").split("=")
    if not re.fullmatch(r"[+-]?\d+([+-]\d+)*", answer):
        return 0.0
    terms = re.findall(r"[+-]?\d+", answer)
    used = sorted(int(t.lstrip("+-")) for t in terms)
    return float(used == sorted(map(int, numbers.split(","))) and sum(map(int, terms)) == int(target))


@lru_cache(maxsize=1)
def _characters() -> tuple[dict[str, int], dict[int, str]]:
    ids = {c: i for c, i in build_tokenizer().get_vocab().items() if len(c) == 1}
    return ids, {i: c for c, i in ids.items()}


def _encode(text: str) -> list[int]:
    ids = _characters()[0]
    return [ids[c] for c in text]


def _decode(tokens: tuple[int, ...]) -> str:
    characters = _characters()[1]
    return "".join(characters.get(t, "") for t in tokens)


def _pad(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
