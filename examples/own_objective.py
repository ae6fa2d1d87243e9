"""An objective of your own, the whole way: define it, check it, look at it, compare it, and train with it in TRL.

    python examples/own_objective.py [--quick] [--output FOLDER]

It takes about a minute on one core, and `--quick` about half of that. It writes figures and a small model into the folder.
"""

import argparse
import math
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from bandpo import OBJECTIVES, Band, Clip, FDivergence, Objective, RatioBounds, match_radius, policy_loss
from bandpo.testing import check_bounds, check_divergence, check_surrogate

# ---- 1. Define it
#
# A trust region can be the ball of an f-divergence, which is one convex function f with f(1) = 0. This is the power
# divergence of order 3/2, which lies between KL (order 1) and chi-squared (order 2). Functions at the top level of a module
# can be named in a configuration ("own_objective:MINE") and sent to other processes.


def power(u: Tensor) -> Tensor:
    """The generator: convex, with f(1) = 0 and slope 0 at 1."""
    return (u**1.5 - 1.5 * u + 0.5) / 0.75


POWER = FDivergence("power-3/2", power, slope_at_infinity=math.inf)

# The surrogate decides what happens at the edge of the interval. PPO's clip stops the gradient there. This one keeps a tenth
# of it, so that a token that has gone too far still learns something.


def fades(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """`A·r` inside of the interval, and a tenth of the slope outside of it where the clip would have stopped it."""
    ratio = log_ratio.exp()
    inside = ratio.clamp(bounds.lower, bounds.upper)
    return torch.minimum(advantages * ratio, advantages * (inside + 0.1 * (ratio - inside)))


# The objective puts them together. How tokens are averaged and how rewards become advantages belong to it as well.
MINE = Objective(
    bounds=Band(POWER, radius=0.05),
    surrogate=fades,
    aggregation="token-mean",
    advantage="std",
    name="power-fades",
    formula="min(A r, A (clip(r) + 0.1 (r - clip(r)))) with the ball of the power divergence",
)


def check() -> None:
    """2. Check it: each check is an AssertionError with the property, the place and the value if something is wrong."""
    check_divergence(POWER)
    check_bounds(MINE.bounds)
    check_surrogate(MINE.surrogate)
    print("checks: the divergence, its bounds and the surrogate are as the library expects")

    # A mistake would have been found. This function is not convex far from 1, so its "ball" is none.
    try:
        check_divergence(FDivergence("wrong", lambda u: u.log() ** 2))
    except AssertionError as error:
        print(f"checks: a wrong one is refused: {error}")

    # The loss is one call, for any objective.
    old = torch.full((1, 4), 0.2).log()
    new = (old + torch.tensor([[-0.5, 0.0, 0.5, 1.0]])).requires_grad_()
    loss, _ = policy_loss(
        logprobs=new, old_logprobs=old, advantages=torch.ones(1), mask=torch.ones(1, 4), objective=MINE
    )
    loss.backward()
    weights = ", ".join(f"{x:.2f}" for x in (-4 * new.grad[0]).tolist())
    print(f"loss {loss.item():.4f}, weights of four tokens in the gradient {weights}")


def draw(folder: Path) -> None:
    """3. Look at it: its interval beside that of a KL ball, and the weight of each token in the gradient."""
    from bandpo.plots import plot_families
    from bandpo.plots.zoo import plot_weight

    bands = {
        "mine": MINE.bounds,
        "KL ball of the same radius": Band("kl", 0.05),
    }
    for name, figure in (("bounds", plot_families(bands)), ("weight", plot_weight(MINE))):
        path = folder / f"own-objective-{name}.png"
        figure.savefig(path, dpi=110)
        print(f"figure: {path}")


def compare(quick: bool) -> None:
    """4. Compare it: thousands of exact bandits at once, where the best arm has probability 0.01 at the beginning."""
    from bandpo.lab.comparison.exact import Tree, run_tree

    seeds, batches = (50, 20) if quick else (1000, 60)
    print(f"\n{seeds} bandits with 10 arms, {batches} rollouts; the same random numbers for each objective")
    print(f"{'objective':<14}{'found the best arm':>20}{'mean reward':>14}{'entropy':>10}")
    for objective in (OBJECTIVES["grpo"], OBJECTIVES["bandpo-kl"], MINE):
        found = run_tree(Tree(), objective, seeds=seeds, batches=batches)
        share, value, entropy = (x.float().mean().item() for x in (found.commits, found.value, found.entropy))
        print(f"{objective.name:<14}{share:>20.1%}{value:>14.3f}{entropy:>10.2f}")
    # A difference can come from the radius alone. This is the radius at which your ball allows as much as a clip of 0.2.
    print(f"radius of the ball that is as wide as a clip of 0.2: {match_radius(POWER, like=Clip(0.2)):.4f}")


def train(folder: Path, quick: bool) -> None:
    """5. Train with it: TRL's fields for averaging and advantages follow the objective."""
    from datasets import Dataset

    from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()  # one token for each character; nothing is downloaded
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 9) for b in range(1, 9)])

    def digits(completions: list[str], **_: object) -> list[float]:
        """The share of digits: something that a model without any knowledge can learn in a few steps."""
        return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

    trainer = BandGRPOTrainer(
        model=build_model(WarmUp(hidden_size=32, layers=1), tokenizer),
        reward_funcs=digits,
        args=BandGRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=8 if quick else 60,
            num_iterations=2,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=4,
            full_metrics_every=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
        objective=MINE,
    )
    print(f"\nTRL: loss_type={trainer.args.loss_type}, scale_rewards={trainer.args.scale_rewards} follow the objective")
    trainer.train()
    trainer.save_model(str(folder / "model"))
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    outside = [row["outside_fraction/any"] for row in trainer.state.log_history if "outside_fraction/any" in row]
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}, tokens outside of the interval {outside[-1]:.3f}")
    print(f"model: {folder / 'model'}")

    # The same from a file: name the objective where Python finds this module, and every command takes it.
    #     cd examples && bandpo train --objective own_objective:MINE
    #     cd examples && bandpo objectives own_objective:MINE


def main(arguments: list[str] | None = None) -> None:
    """All five steps, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer bandits and fewer steps")
    parser.add_argument("--output", type=Path, help="folder of the figures and the model; a temporary one by default")
    options = parser.parse_args(arguments)
    folder = options.output or Path(tempfile.mkdtemp(prefix="own-objective-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check()
    draw(folder)
    compare(options.quick)
    train(folder, options.quick)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory")
    main()
