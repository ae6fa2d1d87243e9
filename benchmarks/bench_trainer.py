"""The default job: each micro-batch's loss twice on the same inputs, by BandPO and by GRPO's clip, in turn."""

import statistics
import time

from bandpo.train import command as job
from bandpo.train import grpo
from bandpo.zoo import get_objective


def test_overhead_in_the_trainer(tmp_path, monkeypatch, report):
    differences, steps = [], []
    ours, theirs = get_objective("bandpo-kl"), get_objective("grpo")

    class Paired(grpo._Trainer):
        spent = 0.0

        def _compute_loss(self, model, inputs):
            seconds, losses = {}, {}
            for objective in (ours, theirs) if len(differences) % 2 else (theirs, ours):
                self.objective = objective
                start = time.perf_counter()
                losses[objective.name] = super()._compute_loss(model, inputs)
                seconds[objective.name] = time.perf_counter() - start
            self.objective = ours
            self.spent = seconds[theirs.name]
            differences.append(seconds[ours.name] - seconds[theirs.name])
            return losses[ours.name]

        def training_step(self, *args, **kwargs):
            start = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            steps.append(time.perf_counter() - start - self.spent)
            return loss

    monkeypatch.setattr(grpo, "_Trainer", Paired)
    job.train(["--output_dir", str(tmp_path / "run"), "--max_steps", "40", "--save_strategy", "no"])
    median, step = statistics.median(differences), statistics.median(steps)
    note = f"{median * 1e3:+.2f} ms of {step * 1e3:.0f} ms a step, {len(steps)} steps"
    report("BandPO over GRPO in the trainer, share of a step", 100 * median / step, "%", "<= 1", note)
