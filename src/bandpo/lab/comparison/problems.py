"""Learning problems as tensors: prompts of one length, demonstrations for the warm-up, and a verifiable reward.

`paths` and `addition` are built so that a rare way is the better one. `detours` and `traps` have the token profile of a
language model: most tokens are near-certain, and a few forks have many rare options. The others are the tasks of
`bandpo.toy.tasks`. Training and held-out prompts never share a problem.
"""

import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from bandpo.lab.forks.policy import Fork
from bandpo.toy.models import build_tokenizer
from bandpo.toy.tasks import TASKS, make_splits, score

PAD, END, FIRST = 0, 1, 3
"""Token ids of `bandpo.toy.models.build_tokenizer`: padding, end of a completion, and the first character."""

VOCABULARY = 98
"""Number of tokens of that tokenizer, and of a problem that has no other vocabulary."""

_HELD_OUT = 192  # held-out prompts of every problem
_WALKS = 60_000  # random walks from which the demonstrations of `paths` come
_SUMS = 16_000  # random pairs of numbers of `addition`
_KEYS = MappingProxyType(
    {"demonstrations": 8192, "train": 4096, "tuning": 4096, "tuning_held_out": 128, "held_out": 128}
)
"""Prompts of `forks` by the set that they belong to; no prompt is in two sets."""
_OPTIONS, _SYMBOLS, _KEY = 112, 29, 4  # options of a fork, symbols of a key, symbols of a prompt
_WIDEST = 26  # characters of a prompt: a few long ones of letter_counting would make all others long


Grade = Callable[[Tensor, Tensor], Tensor]
"""A function of prompts `(count, width)` and completions `(count, length)` that returns the rewards `(count,)`."""

Reward = Callable[[tuple[int, ...], tuple[int, ...]], float]
"""A function of a prompt's tokens and a completion's tokens before END; 0 or 1."""


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
        grade: Function of prompts and completions that returns their rewards, 0 or 1.
        text: Function that turns tokens into text for people.
        warm_up_steps: Supervised steps after which most groups have a signal.
        warm_up_batch: Demonstrations of a supervised step.
        warm_up_rate: Peak of the learning rate of these steps.
        near_certain: The least share of tokens of demonstrations that must have p >= 0.99 after the warm-up.
        vocabulary: Number of tokens of the models.
        forks: Places of a completion with many options, whose entropy is measured by itself.
        tuning: Training and evaluation prompts for the choice of a learning rate, which are in no other set; None if there are
            none.
        base: Name of the problem with the same demonstrations whose warm-ups it shares, where that is another one.

    Raises:
        ValueError: If a token is not in the vocabulary.
    """

    name: str
    description: str
    prompts: Tensor
    held_out: Tensor
    demonstrations: Tensor
    length: int
    grade: Grade
    text: Callable[[list[int]], str]
    warm_up_steps: int
    warm_up_batch: int = 128
    warm_up_rate: float = 4e-3
    near_certain: float = 0.0
    vocabulary: int = VOCABULARY
    forks: tuple[int, ...] = ()
    tuning: tuple[Tensor, Tensor] | None = None
    base: str = ""

    def __post_init__(self) -> None:
        for name, tokens in (
            ("prompts", self.prompts),
            ("held_out", self.held_out),
            ("demonstrations", self.demonstrations),
        ):
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
                raise ValueError(
                    f"problem {self.name}: {name} has tokens from {int(tokens.min())} to {int(tokens.max())}; with "
                    f"vocabulary={self.vocabulary}, tokens are from 0 to {self.vocabulary - 1}"
                )

    def rewards(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The rewards of completions; a completion without an end token has reward 0.

        Args:
            prompts: `(count, width)` tokens.
            completions: `(count, length)` tokens.

        Returns:
            `(count,)`, float32, on the device of the completions.
        """
        return self.grade(prompts, completions)

    def for_tuning(self) -> "Problem":
        """The problem with the prompts on which learning rates are chosen in the place of those of the report.

        Raises:
            ValueError: If the problem has no prompts for tuning.
        """
        if self.tuning is None:
            raise ValueError(
                f"problem {self.name} has no prompts for tuning alone; choose one that has: "
                "detours, traps, or split='report'"
            )
        return replace(self, prompts=self.tuning[0], held_out=self.tuning[1])

    def to(self, device: torch.device) -> "Problem":
        """The problem with its tensors on a device.

        Args:
            device: The device.
        """
        if self.prompts.device == device:
            return self
        tensors: dict[str, Any] = {
            name: getattr(self, name).to(device) for name in ("prompts", "held_out", "demonstrations")
        }
        if self.tuning is not None:
            tensors["tuning"] = tuple(x.to(device) for x in self.tuning)
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
        grade=one_by_one(reward),
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
        grade=one_by_one(reward),
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
        grade=one_by_one(reward),
        text=lambda tokens: _decode(tuple(tokens)).lstrip(),
        warm_up_steps=250,
    )


def forks(name: str, *, good: int, common_solves: int, good_solves: int, base: str = "", seed: int = 0) -> Problem:
    """Copying a key with two forks on the way, for models with the token profile of a language model.

    A prompt is a key of 4 symbols. A completion is a token A of the first fork, 2 symbols of the key, a token B of the second
    fork, the other 2 symbols, and END: 7 tokens, of which 5 are near-certain after the warm-up and two have 112 options: a
    common one (0.9), 8 of probability 0.008, and 103 that share the rest by Zipf's law. B decides nothing, but its rare options
    are rewarded and punished with the rest of the completion. A decides: the prompt has a type that no model can know, a hash
    of the key, and each option of A solves some of the types. One type for each good option is solved by that option alone. So
    a policy that keeps all good options has the highest pass@k, at the same mean as one that keeps a single one. The copying
    must hold for keys that were never seen. The demonstrations know nothing of rewards.

    Args:
        name: Name of the problem.
        good: Number of good options, at most 8.
        common_solves: Types that the common option solves: so many of the first 8.
        good_solves: Types that each good option solves: so many of the first 8, from its own number on, and one of its own.
        base: Name of the problem whose warm-ups it shares, where that is another one.
        seed: Seed of keys and demonstrations.

    Returns:
        The problem.
    """
    draw = torch.Generator().manual_seed(seed)
    first = FIRST + _SYMBOLS
    keys = torch.randperm(_SYMBOLS**_KEY, generator=draw)[: sum(_KEYS.values())]
    digits = torch.stack([keys // _SYMBOLS**i % _SYMBOLS for i in range(_KEY)], 1) + FIRST
    parts = cast("tuple[Tensor, ...]", digits.split(list(_KEYS.values())))
    sets = dict(zip(_KEYS, parts, strict=True))
    start = Fork(options=_OPTIONS, good=8, rare=0.008).start()[0].exp()
    solves = solutions(Fork(options=_OPTIONS, good=good, common_solves=common_solves, good_solves=good_solves))

    def completions(asked: Tensor) -> Tensor:
        a, b = torch.multinomial(start, 2 * len(asked), replacement=True, generator=draw).view(2, -1, 1)
        end = torch.full_like(a, END)
        return torch.cat([first + a, asked[:, :2], first + _OPTIONS + b, asked[:, 2:], end], 1)

    def grade(asked: Tensor, made: Tensor) -> Tensor:
        a, b = made[:, 0] - first, made[:, 3] - first - _OPTIONS
        options = (a >= 0) & (a < _OPTIONS) & (b >= 0) & (b < _OPTIONS)
        copied = (torch.cat([made[:, 1:3], made[:, 4:6]], 1) == asked).all(1) & (made[:, 6] == END)
        table = solves.to(made.device)
        solved = table[hidden_type(asked, len(table)), a.clamp(0, _OPTIONS - 1)]
        return (options & copied & solved).float()

    asked = sets["demonstrations"].repeat(3, 1)
    return Problem(
        name=name,
        description=DESCRIPTIONS[name],
        prompts=sets["train"],
        held_out=sets["held_out"],
        demonstrations=torch.cat([asked, completions(asked)], 1),
        length=_KEY + 3,
        grade=grade,
        text=_fork_text,
        warm_up_steps=1200,
        warm_up_batch=32,
        warm_up_rate=8e-3,
        near_certain=0.6,
        vocabulary=first + 2 * _OPTIONS,
        forks=(0, 3),
        tuning=(sets["tuning"], sets["tuning_held_out"]),
        base=base,
    )


def hidden_type(keys: Tensor, types: int) -> Tensor:
    """The type of keys of `forks`, a hash of all their symbols that looks random.

    Args:
        keys: `(count, 4)` tokens.
        types: Number of types.

    Returns:
        `(count,)`, int64, from 0 to `types - 1`.
    """
    mixed = torch.zeros_like(keys[:, 0])
    for symbol in keys.unbind(1):
        mixed = (mixed ^ symbol) * 0x5851F42D4C957F2D  # Knuth's multiplier, modulo 2^64
        mixed = mixed ^ (mixed >> 29 & 0x7FFFFFFFF)
    return (mixed >> 20 & 0xFFFFFFFF) % types


def solutions(problem: Fork) -> Tensor:
    """Which option of the first fork of `forks` solves which type, bool, `(types + good, options)`.

    Args:
        problem: Says it for the first types; each of the others is solved by one good option alone.
    """
    alone = torch.zeros(problem.good, problem.options, dtype=torch.bool)
    alone[:, 1 : 1 + problem.good] = torch.eye(problem.good, dtype=torch.bool)
    return torch.cat([problem.solves(), alone])


def _fork_text(tokens: list[int]) -> str:
    """A key as letters, the options of the forks as A0 to A111 and B0 to B111."""
    first = FIRST + _SYMBOLS
    words: list[str] = []
    for token in tokens:
        if token >= first:
            words.append(f"{'AB'[(token - first) // _OPTIONS]}{(token - first) % _OPTIONS}")
        elif token >= FIRST:
            words.append((string.ascii_lowercase + "αβγ")[token - FIRST])
    return " ".join(words)


@lru_cache
def detours() -> Problem:
    """`forks` where eight rare options are better than the common one: many rare tokens are rewarded."""
    return forks("detours", good=8, common_solves=3, good_solves=4)


@lru_cache
def traps() -> Problem:
    """`forks` where the common option is good and two rare ones are better: most rare tokens are punished."""
    return forks("traps", good=2, common_solves=4, good_solves=6, base="detours")


PROBLEMS: Mapping[str, Callable[[], Problem]] = MappingProxyType(
    {
        "paths": paths,
        "addition": addition,
        "detours": detours,
        "traps": traps,
        **{name: (lambda name=name: reasoning(name)) for name in TASKS},
    }
)
"""The learning problems by name; calling one makes it."""

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "paths": "reach a node of a 64-node graph, edges of heavy-tailed probability",
        "addition": "three-digit sums, 2% of demonstrations by the strategy that works",
        "detours": "copy a key with two forks of 112 options, where eight rare options are better than the common one",
        "traps": "copy a key with two forks of 112 options, where the common option is good and nearly all rare ones are wrong",
        **{name: task.description for name, task in TASKS.items()},
    }
)
"""The description of each problem, for pages: making `paths` takes more than a second."""


def one_by_one(reward: Reward) -> Grade:
    """The grade of a reward that the host computes for one completion after the other; 0 for one without END.

    Args:
        reward: The reward of a single completion.
    """

    def grade(prompts: Tensor, completions: Tensor) -> Tensor:
        asked, answers = (cast("list[list[int]]", x.tolist()) for x in (prompts, completions))
        found = [
            reward(tuple(p), tuple(c[: c.index(END)])) if END in c else 0.0 for p, c in zip(asked, answers, strict=True)
        ]
        return torch.tensor(found, device=completions.device)

    return grade


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
