"""Rounds of sampling, labelling and fitting: on-policy preference learning and re-ranking with TRL's DPO trainer."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from bandpo._system.files import latest_whole, read_jsonl, seal, unseal, write_jsonl, write_text
from bandpo.integrations.trl.base import warn
from bandpo.integrations.trl.checkpoint import Say
from bandpo.integrations.trl.dpo import REFERENCE_COLUMNS, BandDPOConfig, BandDPOTrainer
from bandpo.integrations.trl.generate import as_completion, pad_token, sample_batches, score_completions
from bandpo.integrations.trl.host import gathered, ints
from bandpo.integrations.trl.rollout import shuffled_places
from bandpo.preference.losses import reward_calibration
from bandpo.preference.probe import LayerProbe, Pooling, RankedPairs, rerank
from bandpo.preference.sampling import first_wins
from bandpo.preference.tabular import estimate_concentrability

_POSITIVE = (
    "rounds",
    "prompts_per_round",
    "samples_per_prompt",
    "pairs_per_prompt",
    "probe_prompts",
    "max_completion_length",
)
_KEPT = ("train_loss", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

_SEEDS_PER_ROUND = 1000  # between the seeds of two rounds
_FEWEST_PAIRS = 4  # that a probe is fitted on

RewardFunction = Callable[..., list[float | None]]


class Samples(TypedDict):
    """The completions of one prompt."""

    prompt_ids: list[int]
    completions: list[list[int]]
    rewards: list[float]


class Pair(TypedDict):
    """A row of a round's data set: token ids, the difference of the rewards, and log-probs of the reference."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reward_gap: float
    ref_chosen_logps: float
    ref_rejected_logps: float


class _Scored(NamedTuple):
    """What is known of a round's completions, `(prompts, samples)` each."""

    rewards: Tensor
    policy: Tensor
    """Log-probs under the policy."""
    fixed: Tensor
    """Log-probs under the reference of the whole run."""
    hidden: Tensor | None
    """Hidden states of the policy for a probe, `(prompts * samples, layers, width)`."""

    @property
    def log_ratio(self) -> Tensor:
        """Log-ratio of the policy to the reference of the whole run."""
        return self.policy - self.fixed


@dataclass
class OnlinePreferenceConfig(BandDPOConfig):
    """`BandDPOConfig` with the options of the rounds. `max_steps` and `num_train_epochs` are those of one round.

    Raises:
        ValueError: If an option is out of range, or the objective cannot be fitted in rounds.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs of one round."})
    max_steps: int = field(
        default=-1,
        metadata={
            "help": "Optimizer steps of one round, instead of num_train_epochs; -1 for none. Given pairs are one round."
        },
    )
    rounds: int = field(default=5, metadata={"help": "Rounds of sampling, labelling and fitting."})
    resample: bool = field(
        default=True,
        metadata={"help": "Sample again in each round; false keeps the samples of the first round (off-policy)."},
    )
    data: str = field(
        default="latest",
        metadata={"help": "Fit on the pairs of the latest round, or of all rounds: latest, accumulate."},
    )
    prompts_per_round: int = field(default=512, metadata={"help": "Prompts of a round."})
    samples_per_prompt: int = field(default=2, metadata={"help": "Completions of each prompt."})
    pairs_per_prompt: int = field(
        default=1, metadata={"help": "Pairs of each prompt: best and worst, second best and second worst, ..."}
    )
    labels: str = field(
        default="reward",
        metadata={"help": "reward (the better one wins), bradley-terry (with probability σ(gap)), or probe (RBRM)."},
    )
    probe_prompts: int = field(
        default=128,
        metadata={
            "help": "Prompts whose rewards train the probe; no other prompt is scored by the reward function (rbrm)."
        },
    )
    probe_audit: bool = field(
        default=False,
        metadata={
            "help": "Score the re-ranked prompts by the reward function too, only to log how often the probe agrees with it."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens of prompt and completion; None for no limit. Longer samples are refused."
        },
    )
    max_completion_length: int = field(default=256, metadata={"help": "Largest number of tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that sampling keeps (top-p)."})
    generation_batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (("labels", ("reward", "bradley-terry", "probe")), ("data", ("latest", "accumulate"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.samples_per_prompt < 2 * self.pairs_per_prompt:
            raise ValueError(
                f"pairs_per_prompt={self.pairs_per_prompt} needs samples_per_prompt >= {2 * self.pairs_per_prompt}, "
                f"got {self.samples_per_prompt}"
            )
        objective = self.resolve()
        if objective.name == "rbrm" and self.labels != "probe":
            raise ValueError(f"objective 'rbrm' needs labels=probe, got {self.labels!r}")
        if self.labels == "probe" and objective.target == "squared":
            raise ValueError(
                f"labels=probe: objective {self.objective!r} distils rewards, which a probe's scores are not"
            )
        if self.data == "accumulate" and objective.reference == "previous":
            raise ValueError(
                f"data='accumulate': the reference of {self.objective!r} moves with the rounds; use latest"
            )
        super().__post_init__()


def _unprepare(model: Any) -> None:
    """Remove what a trainer has added to a model, TRL's head and accelerate's autocast, so that the next one can add its own.

    Otherwise one patch would be put over the other, and accelerate would not prepare the model a second time: no autocast.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)


class _RoundMeans(TrainerCallback):
    """Means over the pairs of a round, of metrics that are logged for several parts of it, which may differ in size."""

    trainer: BandDPOTrainer

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seen = 0

    def on_log(
        self,
        args: Any,  # noqa: ARG002 (the signature is transformers')
        state: Any,  # noqa: ARG002
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        pairs = max(1, self.trainer.pairs_seen - self._seen)
        self._seen = self.trainer.pairs_seen
        for name, value in (logs or {}).items():
            if name in _KEPT or name.startswith("pairs/"):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + pairs * value, count + pairs)

    def of_round(self) -> dict[str, float]:
        """The means of the round by their names."""
        return {name: total / count for name, (total, count) in self._sums.items()}


class OnlinePreferenceTrainer:
    """Trains in rounds: sample completions, make labelled pairs of them, fit a preference objective with `BandDPOTrainer`.

    This is algorithm 1 of arXiv:2601.08421 (objective "dpo" or another with a fixed reference, latest batch only) and algorithm
    3 ("pdfr", "rebel", "rdrc"). With `resample=False` it is off-policy training. With labels "probe" it is RBRM
    (arXiv:2503.10093): a probe learns from the rewards of a few prompts, then ranks the samples of the others by the hidden
    states of the current policy. The reward function does not score those others, and the probe never ranks a prompt that it
    has learned from.

    The reference scores each batch beside the policy, in the same precision, so that log-ratios of equal weights are 0. Weights
    are trained in float32 unless the model or `model_init_kwargs` ask for another dtype.

    A round is complete when its folder in `output_dir/rounds` is sealed, as a checkpoint is. `train(resume=True)` continues
    after the last complete round, with the same result as an uninterrupted run. Supported are full weights, text, and data
    parallel training; completions are sampled by transformers' `generate`.

    Args:
        model: A causal LM, or where to load it from.
        reward_funcs: A reward function with TRL's signature.
        args: An `OnlinePreferenceConfig`.
        train_dataset: Prompts, with the columns that the reward function takes.
        processing_class: The tokenizer.
        callbacks: Callbacks for the trainer of each round.

    Raises:
        TypeError: If `args` is no `OnlinePreferenceConfig`.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction,
        args: OnlinePreferenceConfig,
        train_dataset: Dataset,
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, OnlinePreferenceConfig):
            raise TypeError(f"args: pass an OnlinePreferenceConfig, got {type(args).__name__}")
        self.say: Say = warn
        """Shows messages to the user."""
        self.args, self.reward, self.tokenizer = args, reward_funcs, processing_class
        self.prompts, self.callbacks = train_dataset, callbacks or []
        self.objective = args.resolve()
        if isinstance(model, str):
            given = cast("dict[str, Any]", args.model_init_kwargs or {})
            options: dict[str, Any] = {"dtype": "float32", **given}  # as TRL loads a model to train
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code, **options)
        self.model = model.to(args.device)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.probe: LayerProbe | None = None
        self._optimizer: Any = None
        self._optimizer_state: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".") / "rounds"

    def train(self, *, resume: bool = False) -> list[dict[str, float]]:
        """Train for all rounds.

        Args:
            resume: Continue after the last complete round in `output_dir`.

        Returns:
            The measurements of each round, as in `history`.

        Raises:
            ValueError: If a round has no pair to learn from, or a sample is longer than `max_length`.
        """
        start = self._restore() if resume else 0
        for k in range(start, self.args.rounds):
            set_seed(self._seed(k))
            pairs, measured = self._make_pairs(k)
            data = [pairs] if self.args.data == "latest" else [*(self._load_pairs(j) for j in range(k)), pairs]
            self._fit([row for part in data for row in part], k)
            self._save(k, pairs, measured)
        return self.history

    def _make_pairs(self, k: int) -> tuple[list[Pair], dict[str, float]]:
        """The pairs of round k, and its measurements for the log."""
        fresh = k == 0 or self.args.resample
        samples = self._sample(k) if fresh else self._load_samples()
        if k == 0 and not self.args.resample and PartialState().is_main_process:
            self._write(self._folder / "samples.jsonl", samples)
        scored = self._score_samples(samples)
        taught = torch.tensor(self._teachers(k)) if self.args.labels == "probe" else None
        scores = scored.rewards if taught is None else self._probe_scores(scored, taught)
        ranked = rerank(
            scores, top=self.args.pairs_per_prompt, bottom=self.args.pairs_per_prompt, ties=self.objective.needs_gap
        )
        pairs = self._labelled_pairs(k, samples, scored, ranked)
        if not pairs:
            raise ValueError(
                f"round {k + 1}: no prompt has completions of different rewards, so there is no pair to learn from; raise "
                "samples_per_prompt or prompts_per_round, or start from a model that sometimes succeeds"
            )
        measured = {"round": float(k), "pairs": float(len(pairs)), "generated_tokens": 0.0}
        if fresh:  # old samples tell neither the policy's reward nor its distance from the start
            measured |= self._measure(samples, scored, taught)
        if taught is not None and self.args.probe_audit:
            measured |= _agreement(scored.rewards, ranked)
        return pairs, measured

    def _score_samples(self, samples: list[Samples]) -> _Scored:
        """Rewards, log-probs and hidden states of all completions."""
        prompts = [row["prompt_ids"] for row in samples for _ in row["completions"]]
        completions = [c for row in samples for c in row["completions"]]
        self._refuse_long(prompts, completions)
        pooling = cast("Pooling", self.args.probe_pooling) if self.args.labels == "probe" else None
        policy, hidden = self._score(self.model, prompts, completions, hidden=pooling)
        fixed, _ = self._score(self.reference, prompts, completions)
        rewards = torch.tensor([row["rewards"] for row in samples], dtype=torch.float32)
        return _Scored(rewards, policy.view(rewards.shape), fixed.view(rewards.shape), hidden)

    def _probe_scores(self, scored: _Scored, taught: Tensor) -> Tensor:
        """The scores of a probe that was trained on the prompts in `taught`; NaN for the completions of those prompts."""
        assert scored.hidden is not None
        hidden, shape = scored.hidden, scored.rewards.shape
        # A new probe each round: the policy's hidden states have changed, and the rewards of these prompts are known anyway.
        probe = self._teach_probe(hidden.view(*shape, *hidden.shape[1:])[taught], scored.rewards[taught])
        with torch.no_grad():
            scores = probe(hidden.to(self.args.device)).cpu().view(shape)
        scores[taught] = torch.nan  # only the prompts that the probe has not learned from are re-ranked
        return scores

    def _labelled_pairs(self, k: int, samples: list[Samples], scored: _Scored, ranked: RankedPairs) -> list[Pair]:
        """The pairs of round k as rows of a data set, labelled, with the log-probs of their reference."""
        group, first, second, gap = ranked
        if self.args.labels == "bradley-terry" and self.objective.target != "squared":
            draw = torch.Generator().manual_seed(self._seed(k))
            wins = first_wins(gap * self.objective.label_scale, generator=draw)
            first, second = torch.where(wins, first, second), torch.where(wins, second, first)
        reference = scored.fixed
        if self.objective.reference == "previous":
            u = scored.log_ratio
            gap = reward_calibration(gap, u[group, first] - u[group, second], self.objective.calibration)
            reference = scored.policy
        places = zip(ints(group), ints(first), ints(second), strict=True)
        return [
            {
                "prompt_ids": samples[g]["prompt_ids"],
                "chosen_ids": samples[g]["completions"][a],
                "rejected_ids": samples[g]["completions"][b],
                "reward_gap": d,
                "ref_chosen_logps": reference[g, a].item(),
                "ref_rejected_logps": reference[g, b].item(),
            }
            for (g, a, b), d in zip(places, cast("list[float]", gap.tolist()), strict=True)
        ]

    def _measure(self, samples: list[Samples], scored: _Scored, taught: Tensor | None) -> dict[str, float]:
        """Reward, unscored completions, distance from the start, and tokens of new samples."""
        rewards = scored.rewards
        asked = rewards if taught is None or self.args.probe_audit else rewards[taught]
        return {
            "reward": rewards.nanmean().item(),
            "unscored": float(asked.isnan().sum()),
            **self._distance(scored.log_ratio),
            "generated_tokens": float(sum(len(c) for row in samples for c in row["completions"])),
        }

    def _distance(self, log_ratio: Tensor) -> dict[str, float]:
        """The distance from the start; nothing where the sampler is another policy than the one of the log-probs."""
        if self.args.temperature != 1 or self.args.top_p != 1:
            return {}
        estimate = estimate_concentrability(log_ratio)
        found = {
            "concentrability/mean": estimate.mean.item(),
            "concentrability/max": estimate.maximum.item(),
            "concentrability/log_mean": estimate.log_mean.item(),
        }
        share = estimate.nonfinite.item()
        return {**found, "concentrability/nonfinite": share} if share else found

    def _seed(self, k: int) -> int:
        """The seed of round k."""
        return self.args.seed + _SEEDS_PER_ROUND * (k + 1)

    def _sample(self, k: int) -> list[Samples]:
        """Completions of the prompts of round k, the same on every process."""
        rows: list[dict[str, Any]] = [self.prompts[i] for i in self._places(k)]
        asked_for = (
            self._teachers(k) if self.args.labels == "probe" and not self.args.probe_audit else [True] * len(rows)
        )
        found: list[tuple[int, list[int], list[list[int]], list[float]]] = []
        size = self.args.samples_per_prompt
        for numbers, asked, completions in sample_batches(
            self.model,
            self.tokenizer,
            [row["prompt"] for row in rows],
            samples=size,
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            batch_size=self.args.generation_batch_size,
            seed=self._seed(k),
            autocast=self._autocast,
        ):
            parts = {i: completions[j * size : (j + 1) * size] for j, i in enumerate(numbers)}
            rewards = self._rewards({i: part for i, part in parts.items() if asked_for[i]}, rows)
            for i, ids in zip(numbers, asked, strict=True):
                found.append((i, ids, parts[i], rewards.get(i, [math.nan] * size)))
        everything = sorted(gathered(found)) if PartialState().num_processes > 1 else found
        return [{"prompt_ids": p, "completions": c, "rewards": r} for _, p, c, r in everything]

    def _places(self, k: int) -> list[int]:
        """Rows of the data set that round k samples for."""
        count = self.args.prompts_per_round
        return shuffled_places(k * count, count, of=len(self.prompts), seed=self.args.seed)

    def _teachers(self, k: int) -> list[bool]:
        """Which prompts of round k train the probe: those that have trained it in an earlier round, then the first others."""
        texts = [repr(prompt) for prompt in cast("list[object]", self.prompts["prompt"])]
        known: set[str] = set()
        keys: list[str] = []
        for j in range(k + 1) if self.args.resample else (0,):
            keys = [texts[i] for i in self._places(j)]
            different = list(dict.fromkeys(keys))
            new = [key for key in different if key not in known]
            wanted = min(self.args.probe_prompts, len(different) - 1) - (len(different) - len(new))
            known |= set(new[: max(0, wanted)])
        if all(key in known for key in keys):
            raise ValueError(
                f"round {k + 1}: each of its prompts has taught the probe, so none is left to rank; give more prompts, or "
                "lower probe_prompts or rounds"
            )
        return [key in known for key in keys]

    def _refuse_long(self, prompts: list[list[int]], completions: list[list[int]]) -> None:
        limit = self.args.max_length
        long = 0 if limit is None else sum(len(p) + len(c) > limit for p, c in zip(prompts, completions, strict=True))
        if long:
            raise ValueError(
                f"max_length={limit}: {long} of {len(prompts)} samples are longer and would be cut, in training but not in "
                f"their rewards; set it to None, or lower max_completion_length={self.args.max_completion_length}"
            )

    def _rewards(self, completions: dict[int, list[list[int]]], rows: list[dict[str, Any]]) -> dict[int, list[float]]:
        """Rewards of the completions of each prompt, by the number of the prompt."""
        if not completions:
            return {}
        size = self.args.samples_per_prompt
        repeated = [rows[i] for i in completions for _ in range(size)]
        texts = self.tokenizer.batch_decode(
            [c for part in completions.values() for c in part], skip_special_tokens=True
        )
        columns = {name: [row[name] for row in repeated] for name in repeated[0] if name != "prompt"}
        asked = [row["prompt"] for row in repeated]
        values = self.reward(asked, [as_completion(p, t) for p, t in zip(asked, texts, strict=True)], **columns)
        scores = [math.nan if v is None else float(v) for v in values]
        return {i: scores[j * size : (j + 1) * size] for j, i in enumerate(completions)}

    def _score(
        self, model: Any, prompts: list[list[int]], completions: list[list[int]], *, hidden: Pooling | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of completions in the trainer's precision, and hidden states of the policy if a pooling is given."""
        return score_completions(
            model,
            prompts,
            completions,
            pad=pad_token(self.tokenizer),
            hidden=hidden,
            batch_size=self.args.generation_batch_size,
            autocast=self._autocast,
        )

    @property
    def _autocast(self) -> torch.dtype | None:
        """The dtype of forward passes between the rounds, which no accelerator prepares."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def _teach_probe(self, hidden: Tensor, rewards: Tensor) -> LayerProbe:
        """Fit a probe on the best and worst completions of the prompts whose rewards are known."""
        pairs = rerank(rewards, top=self.args.pairs_per_prompt, bottom=self.args.pairs_per_prompt)
        if len(pairs.group) < _FEWEST_PAIRS:
            raise ValueError(
                f"only {len(pairs.group)} of {len(rewards)} prompts have completions of different rewards to teach the "
                "probe; raise probe_prompts or samples_per_prompt"
            )
        self.probe = probe = LayerProbe(hidden.shape[-2], hidden.shape[-1], seed=self.args.seed).to(self.args.device)
        chosen, rejected = (hidden[pairs.group, i].to(self.args.device) for i in (pairs.chosen, pairs.rejected))
        probe.fit(chosen, rejected, seed=self.args.seed)
        return probe

    def _fit(self, rows: list[Pair], k: int) -> None:
        """Fit the objective on pairs, with the optimiser of the round before."""
        args = copy.copy(self.args)
        args.output_dir, args.save_strategy = str(self._folder / f"{k}"), SaveStrategy.NO  # rounds are saved whole
        reference = self.reference if self.objective.reference == "fixed" else None
        if self.objective.reference == "previous":
            reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        kept = [{name: x for name, x in row.items() if name not in REFERENCE_COLUMNS} for row in rows]
        self._means = _RoundMeans()
        self._trainer = BandDPOTrainer(
            model=self.model,
            ref_model=reference,
            args=args,
            objective=self.objective,
            probe=self.probe if self.objective.name == "rbrm" else None,
            train_dataset=Dataset.from_list(kept),
            processing_class=self.tokenizer,
            callbacks=[*self.callbacks, self._means],
            optimizers=(self._optimizer, None),
        )
        self._trainer.say = self.say
        self._means.trainer = self._trainer
        self._trainer.remove_callback(PrinterCallback)  # its rows are in `history`
        if self._optimizer_state is not None:
            self._trainer.create_optimizer().load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        self._trainer.train()
        # One optimiser for all rounds: the first steps of a new Adam have full length in every direction, and a round of a few
        # steps would consist of those.
        prepared = cast("Any", self._trainer.optimizer)
        self._optimizer: Any = getattr(prepared, "optimizer", prepared)
        for model in (self.model, self.reference):
            _unprepare(model)

    def _save(self, k: int, pairs: list[Pair], measured: dict[str, float]) -> None:
        """Add the measurements of round k to the history, and write its folder."""
        self.history.append(measured | self._means.of_round() | {"steps": float(self._trainer.state.global_step)})
        folder = self._folder / f"{k}"
        if PartialState().is_main_process:
            unseal(folder)
        self._trainer.save_model(str(folder / "model"))
        if PartialState().is_main_process:
            self._write(folder / "pairs.jsonl", pairs)
            torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")
            if self.probe is not None:
                torch.save(self.probe.state_dict(), folder / "probe.pt")
            write_text(folder / "round.json", json.dumps(self.history))
            seal(folder)  # last and in one step: a round without a seal is made again
            for old in range(
                k - 1
            ):  # a run continues from the last round, or from the one before if the last is damaged
                shutil.rmtree(self._folder / f"{old}" / "model", ignore_errors=True)
                (self._folder / f"{old}" / "optimizer.pt").unlink(missing_ok=True)
        PartialState().wait_for_everyone()

    def _restore(self) -> int:
        """Load the last complete round, and return the number of the next one."""
        rounds = [p for p in self._folder.glob("*") if p.name.isdecimal()]
        folder = latest_whole(rounds, lambda p: int(p.name), self.say)
        if folder is None:
            return 0
        saved = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=self.args.trust_remote_code)
        self.model.load_state_dict(saved.state_dict())
        self.history = json.loads((folder / "round.json").read_text())
        self._optimizer_state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if (folder / "probe.pt").exists():
            state = torch.load(folder / "probe.pt", map_location="cpu", weights_only=True)
            self.probe = LayerProbe(*state["weight"].shape).to(self.args.device)
            self.probe.load_state_dict(state)
        return int(folder.name) + 1

    def _load_samples(self) -> list[Samples]:
        return cast("list[Samples]", read_jsonl(self._folder / "samples.jsonl"))

    def _load_pairs(self, k: int) -> list[Pair]:
        return cast("list[Pair]", read_jsonl(self._folder / f"{k}" / "pairs.jsonl"))

    @staticmethod
    def _write(path: Path, rows: Sequence[object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)


def _agreement(rewards: Tensor, ranked: RankedPairs) -> dict[str, float]:
    """How often the probe prefers the completion with the higher reward, over pairs whose rewards differ."""
    gap = rewards[ranked.group, ranked.chosen] - rewards[ranked.group, ranked.rejected]
    differs = gap.abs() > 0  # false for NaN
    return {"probe/agrees_with_reward": (gap[differs] > 0).float().mean().item()} if differs.any() else {}
