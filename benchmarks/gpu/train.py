"""Part `train`: SmolLM2-135M trained by bandpo-kl, bandpo-kl-upper and grpo on sums, pairs of equal seeds, until time is up.

The loop is our own, on the core alone: sample a group for each prompt, score, old log-probs, a few epochs of minibatches with
`policy_loss`. Weights and optimizer are in float32, products in bfloat16. Each run is one JSON line.
"""

import math
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decoder import Decoder, Sample
from measure import DEVICE, ON_GPU, Part, wait
from torch import Tensor

from bandpo import OBJECTIVES, group_advantages, policy_loss
from bandpo.losses import loss_normalizer

ARMS = ("bandpo-kl", "bandpo-kl-upper", "grpo")
AGAINST = "grpo"
PILOT_SEED = 90


@dataclass
class Settings:
    """Of all runs alike."""

    prompts: int = 64
    group: int = 16
    new: int = 16
    rollouts: int = 16
    epochs: int = 2
    minibatches: int = 4
    micro: int = 256
    held: int = 256
    samples: int = 8
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    pilot_rollouts: int = 6


TINY = Settings(
    prompts=4, group=4, new=3, rollouts=2, epochs=1, minibatches=2, micro=8, held=4, samples=4, rates=(1e-2,)
)


@dataclass
class Task:
    """Prompts as tokens, left-padded, and what is right."""

    ids: Tensor
    attended: Tensor
    answers: list[str]
    tokenizer: Any
    held: Tensor = field(init=False)
    train: Tensor = field(init=False)

    def split(self, held: int) -> None:
        """The first `held` prompts of one fixed order are held out."""
        order = torch.randperm(len(self.answers), generator=torch.Generator().manual_seed(9))
        self.held, self.train = order[:held], order[held:]

    def rewards(self, sample: Sample, which: list[int]) -> Tensor:
        """1 where the last number of a completion is the answer, `(rows,)`."""
        texts = [
            self.tokenizer.decode(row[used], skip_special_tokens=True)
            for row, used in zip(sample.tokens.cpu(), sample.mask.cpu(), strict=True)
        ]
        return torch.tensor([score(text, self.answers[i]) for text, i in zip(texts, which, strict=True)], device=DEVICE)


def score(text: str, answer: str) -> float:
    """Whether the last number in the text is the answer; an answer `*` is any number."""
    numbers = re.findall(r"-?\d+", text)
    return float(bool(numbers) and answer in ("*", numbers[-1]))


def run(part: Part) -> None:
    """Held-out accuracy of the start, a learning rate, then seeds one after the other, all arms of each."""
    settings = TINY if part.tiny else Settings()
    if not part.model or not (Path(part.model) / "config.json").exists():
        part.row(
            "training", None, note=f"left out: no model at {part.model or '--model'}; see benchmarks/gpu/README.md"
        )
        return
    trainer = Trainer(part.model, settings)
    captured = trainer.decoder.capture()
    before = trainer.evaluate()
    note = "the step of the sampler is " + ("one CUDA graph" if captured else "launched operation by operation")
    part.row("accuracy at the start", before, "mean@k", "", note, held=settings.held, samples=settings.samples)
    rate, took = pilot(part, trainer)
    found: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for seed in range(1 if part.tiny else 1000):
        if seed and len(ARMS) * took * 1.1 > part.left():
            break
        for arm in ARMS:
            run_ = trainer.train(arm, seed, rate, settings.rollouts, part)
            took = max(took, run_["seconds"]) if seed or arm != ARMS[0] else run_["seconds"]
            found[arm][seed] = run_["after"]
    summary(part, found)


def pilot(part: Part, trainer: "Trainer") -> tuple[float, float]:
    """The rate of the highest reward at the end of short runs of bandpo-kl, and the seconds that a whole run may take."""
    s = trainer.settings
    ends, seconds = {}, 0.0
    for rate in s.rates:
        if len(ends) and part.left() < 0.7 * (part.left() + seconds * len(ends)):
            break  # a third of the time is enough for this
        short = trainer.train("bandpo-kl", PILOT_SEED, rate, min(s.pilot_rollouts, s.rollouts), part, pilot=True)
        ends[rate] = sum(short["curve"][-2:]) / 2 if all(map(math.isfinite, short["curve"])) else -1.0
        seconds = max(seconds, short["seconds"])
    chosen = max(ends, key=lambda rate: ends[rate])
    part.row("learning rate", chosen, "", "", f"of {', '.join(f'{rate:g} ({end:.3f})' for rate, end in ends.items())}")
    return chosen, seconds * s.rollouts / min(s.pilot_rollouts, s.rollouts)


class Trainer:
    """Model, sampler and task; each run begins with the weights that were loaded."""

    def __init__(self, folder: str, settings: Settings) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.model: Any = model.to(DEVICE).eval()
        self.start = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.task = sums(self.tokenizer)
        self.task.split(settings.held)
        rows = settings.prompts * settings.group
        self.decoder = Decoder(self.model, rows, self.task.ids.shape[1] + settings.new)
        self.eos = self.tokenizer.eos_token_id
        self.pad = self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def sample(self, which: list[int], group: int, seed: int) -> Sample:
        """Completions of these prompts with the weights of now."""
        self.decoder.load(self.model)
        pick = torch.tensor(which)
        ids, attended = self.task.ids[pick.to(DEVICE)], self.task.attended[pick.to(DEVICE)]
        return self.decoder.sample(self.model, ids, attended, group, self.settings.new, self.eos, self.pad, seed)

    def evaluate(self) -> float:
        """mean@k over the held-out prompts; the same random numbers each time."""
        s, right, held = self.settings, [], self.task.held.tolist()
        at_once = s.prompts * s.group // s.samples
        for start in range(0, len(held), at_once):
            part = held[start : start + at_once]
            filled = part + part[:1] * (at_once - len(part))
            each = [i for i in filled for _ in range(s.samples)]
            right.append(self.task.rewards(self.sample(filled, s.samples, 777 + start), each)[: len(part) * s.samples])
        return float(torch.cat(right).mean())

    def logprobs(self, ids: Tensor, attended: Tensor, sample: Sample) -> Tensor:
        """Log-probs of the completions under the model, `(rows, new)`."""
        n = sample.tokens.shape[1]
        seen = torch.cat([attended, sample.mask.long()], 1)
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = self.model(
                input_ids=torch.cat([ids, sample.tokens], 1), attention_mask=seen, position_ids=positions,
                use_cache=False, logits_to_keep=n + 1,
            )  # fmt: skip
        return out.logits[:, :-1].float().log_softmax(-1).gather(-1, sample.tokens[..., None])[..., 0]

    def train(
        self, arm: str, seed: int, rate: float, rollouts: int, part: Part, *, pilot: bool = False
    ) -> dict[str, Any]:
        """One run from the start, as one JSON line."""
        began = time.monotonic()
        s, g = self.settings, torch.Generator().manual_seed(seed)
        self.model.load_state_dict(self.start)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=ON_GPU
        )
        curve, seen, sampling = list[float](), list[dict[str, float]](), 0.0
        for turn in range(rollouts):
            at = time.monotonic()
            which = [int(self.task.train[i]) for i in torch.randint(len(self.task.train), (s.prompts,), generator=g)]
            sample = self.sample(which, s.group, 1000 * seed + turn)
            rewards = self.task.rewards(sample, [i for i in which for _ in range(s.group)])
            curve.append(round(float(rewards.mean()), 4))
            sampling += time.monotonic() - at
            seen.append(self.update(arm, which, sample, rewards, optimizer, g))
        after = None if pilot else self.evaluate()
        wait()
        found = {
            "arm": arm, "seed": seed, "rate": rate, "after": after, "curve": curve, "seconds": time.monotonic() - began,
            "sampling_seconds": sampling, **{name: statistics.fmean(x[name] for x in seen) for name in seen[0]},
        }  # fmt: skip
        part.write({"pilot" if pilot else "run": f"{arm}, seed {seed}", **found})
        return found

    def update(self, arm: str, which: list[int], sample: Sample, rewards: Tensor, optimizer: Any, g: torch.Generator) -> dict[str, float]:  # fmt: skip  # noqa: E501
        """All minibatches of one rollout; what they say on average."""
        s, objective = self.settings, OBJECTIVES[arm]
        used = int(sample.mask.any(0).sum())
        sample = Sample(*(x[:, :used] for x in sample))
        pick = torch.tensor(which, device=DEVICE).repeat_interleave(s.group)
        ids, attended = self.task.ids[pick], self.task.attended[pick]
        advantages = group_advantages(rewards, s.group, kind=objective.advantage)
        rows = torch.arange(len(pick), device=DEVICE)
        with torch.no_grad():
            parts = [self.logprobs(ids[r], attended[r], Sample(*(x[r] for x in sample))) for r in rows.split(s.micro)]
        old = torch.cat(parts)
        kept: list[Tensor] = []
        for _ in range(s.epochs):
            for batch in torch.randperm(len(pick), generator=g).to(DEVICE).chunk(s.minibatches):
                optimizer.zero_grad(set_to_none=True)
                whole = loss_normalizer(sample.mask[batch], objective.aggregation)
                for r in batch.split(s.micro):
                    piece = Sample(*(x[r] for x in sample))
                    loss, metrics = policy_loss(
                        logprobs=self.logprobs(ids[r], attended[r], piece), old_logprobs=old[r],
                        rollout_logprobs=piece.logprobs, advantages=advantages[r], mask=piece.mask,
                        objective=objective, normalizer=whole,
                    )  # fmt: skip
                    loss.backward()
                    kept.append(torch.stack([metrics["clip_fraction/any"], metrics["kl/old_new"]]))
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
        clipped, kl = torch.stack(kept).nanmean(0).tolist()
        gap = (old - sample.logprobs)[sample.mask].abs()
        return {"clip_fraction": clipped, "kl": kl, "mismatch": float(gap.mean()), "mismatch_max": float(gap.max())}


def sums(tokenizer: Any, count: int = 1200) -> Task:
    """Sums and differences after one example; any number is right where the model's vocabulary is a toy's."""
    r, texts, answers = random.Random(0), list[str](), list[str]()
    toy, seen = tokenizer.vocab_size < 1000, set[str]()
    while len(texts) < (40 if toy else count):
        a, b, sign = r.randint(1, 60), r.randint(1, 20), r.choice("+-")
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        if (asked := f"{a} {sign} {b}") in seen:
            continue
        seen.add(asked)
        chat = [
            {"role": "system", "content": "Add."}, {"role": "user", "content": "What is 31 + 6?"},
            {"role": "assistant", "content": "31 + 6 = 37"}, {"role": "user", "content": f"What is {asked}?"},
        ]  # fmt: skip
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        answers.append("*" if toy else str(a + b if sign == "+" else a - b))
    found = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(DEVICE)
    return Task(found["input_ids"], found["attention_mask"], answers, tokenizer)


def summary(part: Part, found: dict[str, dict[int, float]]) -> None:
    """Each arm, and its paired difference from grpo with the sign-flip p-value."""
    for arm, after in found.items():
        if after:
            part.row(f"accuracy after training, {arm}", statistics.fmean(after.values()), "mean@k", seeds=len(after))
    for arm, after in found.items():
        gaps = [after[seed] - found[AGAINST][seed] for seed in after if seed in found[AGAINST]]
        if arm != AGAINST and gaps:
            spread = statistics.stdev(gaps) if len(gaps) > 1 else None
            p = sign_flip(gaps)
            note = f"{len(gaps)} pairs of equal seeds, sign-flip p = {p:.3g}"
            part.row(
                f"{arm} - {AGAINST}, accuracy", statistics.fmean(gaps), "mean@k", "", note, sd=spread, p=p, gaps=gaps
            )


def sign_flip(gaps: list[float]) -> float:
    """Two-sided p-value of the mean under all choices of signs; of 4,096 random ones beyond 12 pairs."""
    n, seen = len(gaps), abs(sum(gaps)) - 1e-12
    r = random.Random(0)
    choices = range(1 << n) if n <= 12 else [r.getrandbits(n) for _ in range(4096)]
    extreme = [abs(sum(-x if c >> i & 1 else x for i, x in enumerate(gaps))) >= seen for c in choices]
    return (sum(extreme) + (n > 12)) / (len(extreme) + (n > 12))
