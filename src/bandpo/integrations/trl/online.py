"""Rounds of sampling, labelling and fitting: on-policy preference learning and re-ranking, on TRL's DPO trainer."""

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from bandpo._system.files import latest_whole, read_jsonl, seal, unseal, write_jsonl, write_text
from bandpo.integrations.trl.dpo import REFERENCE_COLUMNS, BandDPOConfig, BandDPOTrainer
from bandpo.integrations.trl.generate import as_completion, pad_token, sample_batches, score_completions
from bandpo.preference.losses import reward_calibration
from bandpo.preference.probe import LayerProbe, Pooling, rerank
from bandpo.preference.sampling import first_wins
from bandpo.preference.tabular import estimate_concentrability

_KEPT = ("train_loss", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

RewardFunction = Callable[..., list[float | None]]


@dataclass
class OnlinePreferenceConfig(BandDPOConfig):
    """`BandDPOConfig` and how the rounds go. `max_steps` and `num_train_epochs` are those of one round.

    Raises:
        ValueError: If an option is out of range, or the objective cannot be fitted in rounds.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over a round's pairs."})
    rounds: int = field(default=5, metadata={"help": "Rounds of sampling, labelling and fitting."})
    resample: bool = field(
        default=True, metadata={"help": "Sample anew each round; false keeps the first round's samples (off-policy)."}
    )
    data: str = field(
        default="latest", metadata={"help": "Fit on the latest round's pairs, or on all: latest, accumulate."}
    )
    prompts_per_round: int = field(default=512, metadata={"help": "Prompts to sample for."})
    samples_per_prompt: int = field(default=2, metadata={"help": "Completions of each."})
    pairs_per_prompt: int = field(default=1, metadata={"help": "Best against worst, second against second, ..."})
    labels: str = field(
        default="reward",
        metadata={"help": "reward (the better one wins), bradley-terry (with probability σ(gap)), or probe (RBRM)."},
    )
    probe_prompts: int = field(
        default=128,
        metadata={"help": "Prompts whose rewards teach the probe; the reward is asked for no other (rbrm)."},
    )
    probe_audit: bool = field(
        default=False,
        metadata={
            "help": "Ask the reward for the re-ranked prompts too, only to log how often the probe agrees with it."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest prompt and completion; None for no limit. What is longer is refused, not cut."
        },
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    generation_batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})

    def __post_init__(self) -> None:
        for name in (
            "rounds", "prompts_per_round", "samples_per_prompt", "pairs_per_prompt", "probe_prompts", "max_completion_length",
        ):  # fmt: skip
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
    """Take off what a trainer has put on a model, for the next one to put on its own: TRL's head and accelerate's autocast.

    One patch would come over the other, and accelerate leaves a model alone that it has prepared once: without autocast.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)


class _RoundMeans(TrainerCallback):
    """Means over a round's pairs of what is logged in windows of it, which need not be of one size."""

    trainer: BandDPOTrainer

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seen = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002 (transformers')
        pairs = max(1, self.trainer.pairs_seen - self._seen)
        self._seen = self.trainer.pairs_seen
        for name, value in (logs or {}).items():
            if name in _KEPT or name.startswith("pairs/"):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + pairs * value, count + pairs)

    def of_round(self) -> dict[str, float]:
        """The means."""
        return {name: total / count for name, (total, count) in self._sums.items()}


class OnlinePreferenceTrainer:
    """Rounds of: sample pairs from the policy, label them, fit a preference objective with `BandDPOTrainer`.

    arXiv:2601.08421, algorithm 1 (objective "dpo" or another with a fixed reference, latest batch only) and algorithm 3
    ("pdfr", "rebel", "rdrc"); with `resample=False` off-policy training; with labels "probe" RBRM (arXiv:2503.10093): a probe
    learns from the rewards of a few prompts, then ranks the samples of the others by the current policy's hidden states. The
    reward is not asked for those, and a prompt that the probe has learned from is never ranked by it.

    The reference scores each batch beside the policy, in the same precision, so that log-ratios of equal weights are 0. Weights
    are trained in float32 unless the model or `model_init_kwargs` say otherwise.

    A round is done when its folder in `output_dir/rounds` is sealed (as a checkpoint is); `train(resume=True)` continues
    after the last one, with the same result as an uninterrupted run. Full weights, text, data parallel; sampling is
    transformers' `generate`.

    Args:
        model: A causal LM, or where to load it from.
        reward_funcs: A reward function with TRL's signature.
        args: An `OnlinePreferenceConfig`.
        train_dataset: Prompts, with the columns that the reward function takes.
        processing_class: The tokenizer.
        callbacks: For each round's trainer.
    """

    def __init__(
        self, model: Any, reward_funcs: RewardFunction, args: OnlinePreferenceConfig, train_dataset: Dataset,
        processing_class: Any, callbacks: list[TrainerCallback] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(args, OnlinePreferenceConfig):
            raise TypeError(f"args: pass an OnlinePreferenceConfig, got {type(args).__name__}")
        self.args, self.reward, self.tokenizer = args, reward_funcs, processing_class
        self.prompts, self.callbacks = train_dataset, callbacks or []
        self.objective = args.resolve()
        if isinstance(model, str):
            options = {"dtype": "float32", **(args.model_init_kwargs or {})}  # as TRL loads what it trains
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code, **options)
        self.model = model.to(args.device)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.probe: LayerProbe | None = None
        self._optimizer: Any = None
        self._optimizer_state: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir) / "rounds"

    def train(self, *, resume: bool = False) -> list[dict[str, float]]:
        """Do the rounds; what each of them measured.

        Args:
            resume: Continue after the last complete round in `output_dir`.
        """
        start = self._restore() if resume else 0
        for k in range(start, self.args.rounds):
            set_seed(self.args.seed + 1000 * (k + 1))
            pairs, measured = self._make_pairs(k)
            data = [pairs] if self.args.data == "latest" else [*(self._load_pairs(j) for j in range(k)), pairs]
            self._fit([row for part in data for row in part], k)
            self._save(k, pairs, measured)
        return self.history

    def _make_pairs(self, k: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Rows of this round's data set, and what is worth a line in the log."""
        fresh = k == 0 or self.args.resample
        samples = self._sample(k) if fresh else self._load_samples()
        if k == 0 and not self.args.resample and PartialState().is_main_process:
            self._write(self._folder / "samples.jsonl", samples)
        prompt = [row["prompt_ids"] for row in samples for _ in row["completions"]]
        completion = [c for row in samples for c in row["completions"]]
        self._refuse_long(prompt, completion)
        use_probe = self.args.labels == "probe"
        policy, hidden = self._score(
            self.model, prompt, completion, hidden=self.args.probe_pooling if use_probe else None,  # type: ignore[arg-type]
        )  # fmt: skip
        fixed, _ = self._score(self.reference, prompt, completion)
        shape = (len(samples), self.args.samples_per_prompt)
        rewards = torch.tensor([row["rewards"] for row in samples], dtype=torch.float32)
        scores = rewards
        if use_probe:
            assert hidden is not None
            # Anew each round: the policy's hidden states have moved, and the rewards of these prompts are known anyway.
            taught = torch.tensor(self._teachers(k))
            self._teach_probe(hidden.view(*shape, *hidden.shape[1:])[taught], rewards[taught])
            assert self.probe is not None
            with torch.no_grad():
                scores = self.probe(hidden.to(self.args.device)).cpu().view(shape)
            scores[taught] = torch.nan  # the probe has learned from these prompts; only the others are re-ranked
        ranked = rerank(
            scores, top=self.args.pairs_per_prompt, bottom=self.args.pairs_per_prompt, ties=self.objective.needs_gap
        )
        first, second, gap = ranked.chosen, ranked.rejected, ranked.gap
        if self.args.labels == "bradley-terry" and self.objective.target != "squared":
            draw = torch.Generator().manual_seed(self.args.seed + 1000 * (k + 1))
            wins = first_wins(gap * self.objective.label_scale, generator=draw)
            first, second = torch.where(wins, first, second), torch.where(wins, second, first)
        u = (policy - fixed).view(shape)
        if self.objective.reference == "previous":
            gap = reward_calibration(gap, u[ranked.group, first] - u[ranked.group, second], self.objective.calibration)
        reference = (policy if self.objective.reference == "previous" else fixed).view(shape)
        rows = [
            {
                "prompt_ids": samples[g]["prompt_ids"], "chosen_ids": samples[g]["completions"][a],
                "rejected_ids": samples[g]["completions"][b], "reward_gap": d,
                "ref_chosen_logps": reference[g, a].item(), "ref_rejected_logps": reference[g, b].item(),
            }
            for g, a, b, d in zip(ranked.group.tolist(), first.tolist(), second.tolist(), gap.tolist(), strict=True)
        ]  # fmt: skip
        if not rows:
            raise ValueError(
                f"round {k}: no prompt has completions of different rewards, so there is no pair to learn from; raise "
                "samples_per_prompt or prompts_per_round, or start from a model that sometimes succeeds"
            )
        measured = {"round": float(k), "pairs": float(len(rows))}
        if fresh:  # old samples tell neither the policy's reward nor its distance from the start
            asked = torch.ones(len(samples), dtype=torch.bool)
            if use_probe and not self.args.probe_audit:
                asked = taught
            estimate = estimate_concentrability(u)
            measured |= {
                "reward": rewards.nanmean().item(), "unscored": float(rewards[asked].isnan().sum()),
                "concentrability/mean": estimate.mean.item(), "concentrability/max": estimate.maximum.item(),
                "concentrability/log_mean": estimate.log_mean.item(),
            }  # fmt: skip
        measured["generated_tokens"] = float(sum(map(len, completion))) if fresh else 0.0
        if use_probe and self.args.probe_audit:
            gap = rewards[ranked.group, ranked.chosen] - rewards[ranked.group, ranked.rejected]
            differs = gap.abs() > 0  # false for NaN
            if differs.any():
                measured["probe/agrees_with_reward"] = (gap[differs] > 0).float().mean().item()
        return rows, measured

    def _sample(self, k: int) -> list[dict[str, Any]]:
        """Prompts of this round, their completions' tokens and rewards, on every process alike."""
        rows = [self.prompts[i] for i in self._places(k)]
        asked_for = (
            self._teachers(k) if self.args.labels == "probe" and not self.args.probe_audit else [True] * len(rows)
        )
        found: list[tuple[int, list[int], list[list[int]], list[float]]] = []
        for numbers, asked, completions in sample_batches(
            self.model, self.tokenizer, [row["prompt"] for row in rows], samples=self.args.samples_per_prompt,
            max_new_tokens=self.args.max_completion_length, temperature=self.args.temperature, top_p=self.args.top_p,
            batch_size=self.args.generation_batch_size, seed=self.args.seed + 1000 * (k + 1),
        ):  # fmt: skip
            size = self.args.samples_per_prompt
            parts = {i: completions[j * size : (j + 1) * size] for j, i in enumerate(numbers)}
            rewards = self._rewards({i: part for i, part in parts.items() if asked_for[i]}, rows)
            for i, ids in zip(numbers, asked, strict=True):
                found.append((i, ids, parts[i], rewards.get(i, [math.nan] * size)))
        everything = sorted(gather_object(found)) if PartialState().num_processes > 1 else found
        return [{"prompt_ids": p, "completions": c, "rewards": r} for _, p, c, r in everything]

    def _places(self, k: int) -> list[int]:
        """Rows of the data set that round k samples for: one order of all after the other."""
        n, count = len(self.prompts), self.args.prompts_per_round
        places = torch.arange(k * count, (k + 1) * count)
        epochs = places.div(n, rounding_mode="floor")
        chosen: list[int] = []
        for epoch in epochs.unique().tolist():
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.args.seed + 7919 * (epoch + 1)))
            chosen += order[places[epochs == epoch] % n].tolist()
        return chosen

    def _teachers(self, k: int) -> list[bool]:
        """Which of round k's prompts teach the probe: those that have taught it in a round before, then the first others."""
        texts = [repr(prompt) for prompt in self.prompts["prompt"]]
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
                f"round {k}: each of its prompts has taught the probe, so none is left to rank; give more prompts, or lower "
                "probe_prompts or rounds"
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
        """Rewards of the completions of each prompt, by its number."""
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
        return score_completions(
            model, prompts, completions, pad=pad_token(self.tokenizer), hidden=hidden,
            batch_size=self.args.generation_batch_size,
            autocast=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None,
        )  # fmt: skip

    def _teach_probe(self, hidden: Tensor, rewards: Tensor) -> None:
        """Fit the probe on the best and worst completions of the prompts whose rewards are known."""
        pairs = rerank(rewards, top=self.args.pairs_per_prompt, bottom=self.args.pairs_per_prompt)
        if len(pairs.group) < 4:
            raise ValueError(
                f"only {len(pairs.group)} of {len(rewards)} prompts have completions of different rewards to teach the "
                "probe; raise probe_prompts or samples_per_prompt"
            )
        self.probe = LayerProbe(hidden.shape[-2], hidden.shape[-1], seed=self.args.seed).to(self.args.device)
        chosen, rejected = (hidden[pairs.group, i].to(self.args.device) for i in (pairs.chosen, pairs.rejected))
        self.probe.fit(chosen, rejected, seed=self.args.seed)

    def _fit(self, rows: list[dict[str, Any]], k: int) -> None:
        args = copy.copy(self.args)
        args.output_dir, args.save_strategy = str(self._folder / f"{k}"), SaveStrategy.NO  # rounds are saved whole
        reference = self.reference if self.objective.reference == "fixed" else None
        if self.objective.reference == "previous":
            reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        kept = [{name: x for name, x in row.items() if name not in REFERENCE_COLUMNS} for row in rows]
        self._means = _RoundMeans()
        self._trainer = BandDPOTrainer(
            model=self.model, ref_model=reference, args=args, objective=self.objective,
            probe=self.probe if self.objective.name == "rbrm" else None, train_dataset=Dataset.from_list(kept),
            processing_class=self.tokenizer, callbacks=[*self.callbacks, self._means], optimizers=(self._optimizer, None),
        )  # fmt: skip
        self._means.trainer = self._trainer
        self._trainer.remove_callback(PrinterCallback)  # `history` has it all
        if self._optimizer_state is not None:
            self._trainer.create_optimizer().load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        self._trainer.train()
        # One optimiser for all rounds: a fresh Adam takes its first steps at full length in every direction, and with a few
        # steps in a round those are most of them.
        self._optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        for model in (self.model, self.reference):
            _unprepare(model)

    def _save(self, k: int, pairs: list[dict[str, Any]], measured: dict[str, float]) -> None:
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
            seal(folder)  # last, and in one step: a round without it never happened
            for old in range(k - 1):  # a run continues from the last round, or the one before if that is damaged
                shutil.rmtree(self._folder / f"{old}" / "model", ignore_errors=True)
                (self._folder / f"{old}" / "optimizer.pt").unlink(missing_ok=True)
        PartialState().wait_for_everyone()

    def _restore(self) -> int:
        """Load the last complete round; the number of the one to do next."""
        folder = latest_whole(
            [p for p in self._folder.glob("*") if p.name.isdecimal()], lambda p: int(p.name), self._say
        )
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

    def _say(self, text: str) -> None:
        """Where messages go; a subclass has a better place."""
        warnings.warn(text, stacklevel=2)

    def _load_samples(self) -> list[dict[str, Any]]:
        return read_jsonl(self._folder / "samples.jsonl")

    def _load_pairs(self, k: int) -> list[dict[str, Any]]:
        return read_jsonl(self._folder / f"{k}" / "pairs.jsonl")

    @staticmethod
    def _write(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
