"""The result of an evaluation: what was measured and how, with the counts of each prompt, in memory and as a file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import printable
from bandpo._system.files import finite_or_null
from bandpo._system.secrets import hide_in
from bandpo.statistics import Interval
from bandpo.train.measures import Tally, by_prompt, differences, estimates

LARGEST_FILE = 1 << 28
"""Largest number of bytes of a file of results that is read."""

MOST_SAMPLES = 1 << 14
"""Largest number of samples of a prompt in such a file: the time of pass@k grows with its square."""


@dataclass(frozen=True)
class Result:
    """The evaluation of one model.

    Args:
        settings: What was evaluated and how, as it is written to files: model, data, reward, samples, sampler.
        summary: Summary of the evaluation, as in `Evaluation.summary`.
        alike: What must be the same where models are compared, by its name.
        tallies: Counts of each prompt.
        prompts: A digest of each prompt with its answer, by which evaluations are paired.
    """

    settings: Mapping[str, Any]
    summary: Mapping[str, float]
    alike: Mapping[str, object]
    tallies: Sequence[Tally]
    prompts: Sequence[str]

    @property
    def samples(self) -> int:
        """The number of samples of each prompt."""
        return int(self.settings["samples"])

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """The measures of each prompt, as in `measures.by_prompt`."""
        return by_prompt(self.tallies, self.samples)

    @cached_property
    def measures(self) -> dict[str, Interval]:
        """mean@k, pass@k and maj@k with their 95% intervals over the prompts."""
        return estimates(self.values)

    @property
    def is_binary(self) -> bool:
        """Whether every reward is 0 or 1, so that pass@1 is mean@k."""
        scored = (t for t in self.tallies if t.samples)
        return all(abs(t.mean * t.samples - t.right) < 1e-9 for t in scored)

    def differences_to(self, first: "Result") -> dict[str, Interval]:
        """The measures minus those of another result, paired by prompt, with 95% intervals.

        Args:
            first: A result of the same prompts in the same order.

        Raises:
            ValueError: If the prompts differ.
        """
        if list(first.prompts) != list(self.prompts):
            raise ValueError("results of different prompts cannot be paired")
        return differences(first.values, self.values)

    def content(self) -> dict[str, Any]:
        """The result as JSON: settings, summary, measures with their intervals, and the counts of each prompt."""
        counts = [
            {"prompt": p, "mean": t.mean, "samples": t.samples, "right": t.right, "votes": t.votes}
            for p, t in zip(self.prompts, self.tallies, strict=True)
        ]
        return {
            **self.settings,
            **self.summary,
            "measures": {name: found._asdict() for name, found in self.measures.items()},
            "alike": dict(self.alike),
            "counts": counts,
        }

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a file of `bandpo evaluate` about one model; nothing in it is executed, and no file that it names is opened.

        Args:
            path: A file of RUN/evaluations, or of `--output`.

        Returns:
            The result.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file; the message says what is wrong.
        """
        content: object = parse_json(read_regular(path, LARGEST_FILE), str(path))
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no result of bandpo evaluate: it holds no JSON object")
        found = cast("dict[str, Any]", content)
        try:
            tallies = [_tally(row) for row in found["counts"]]
            prompts = [_text(row["prompt"]) for row in found["counts"]]
            alike = {_text(name): value for name, value in found["alike"].items()}
            samples, _ = _count(found["samples"]), [_text(found[name]) for name in ("model", "data", "reward")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = printable(str(error))[:100]
            raise ValueError(f"{path} is no result of bandpo evaluate about one model: {what}") from None
        if not tallies or not 1 <= samples <= MOST_SAMPLES or max(t.samples for t in tallies) > samples:
            raise ValueError(f"{path} is no result of bandpo evaluate: its counts do not fit {samples} samples")
        names = {**by_prompt(tallies[:1], samples), "groups with signal": 0, "unscored": 0}
        summary = {n: float(v) for n in names if isinstance(v := found.get(n), int | float)}
        others = {*names, "measures", "alike", "counts", "about"}
        settings = {name: value for name, value in found.items() if name not in others}
        return cls(settings, summary, alike, tallies, prompts)


def digest(prompt: Any, answer: object) -> str:
    """A digest of a prompt and its answer, the same for text and for the messages that a chat model gets in its place.

    Args:
        prompt: Text, or messages.
        answer: The reference answer.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(m["content"]) for m in cast("list[dict[str, Any]]", prompt)]
    both = "\n\n".join(texts) + f"\0{answer!r}"
    return blake2b(both.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def file_name(result: Result) -> str:
    """The name of the file of a result: the same for the same evaluation, another one for other settings or prompts.

    Args:
        result: The result of a model of a run, `RUN/model` or `RUN/checkpoint-N`.
    """
    settings = result.settings
    decides = {
        **settings,
        "model": None,
        "held_out_by": None,
        "prompts": list(result.prompts),
        "alike": dict(result.alike),
    }
    text = json.dumps(finite_or_null(hide_in(decides)), sort_keys=True, default=str)
    key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    data = Path(str(settings["data"])).name
    data = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in data)[:40]
    return f"{Path(str(settings['model'])).name}-{data}-{key}.json"


def _tally(row: Any) -> Tally:
    mean, votes = row["mean"], row["votes"]
    samples, right = _count(row["samples"]), _count(row["right"])
    if right > samples:
        raise ValueError(f"{right} right samples of {samples}")
    if votes is not None:
        votes = tuple((_count(n), float(share)) for n, share in votes)
        if sum(n for n, _ in votes) > samples or not all(0 <= share <= 1 and n for n, share in votes):
            raise ValueError(f"votes that do not fit {samples} samples")
    return Tally(math.nan if mean is None else float(mean), samples, right, votes)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 30:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
