"""What docs/train.md says about one GPU, as far as a CPU can tell: which fused paths a run takes."""

import pytest
import torch

from bandpo import policy_loss
from bandpo.surrogates import kernel
from trl_runs import band_trainer, rollout


def test_the_loss_is_computed_without_the_matrix_of_logits(make_model, tokenizer, prompts, tmp_path):
    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=None)
    trainer.model.lm_head.register_forward_hook(lambda *_: pytest.fail("all logits"))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout(tokenizer)).backward()


@pytest.mark.parametrize(("name", "asked"), [("grpo", True), ("bandpo-kl", False)])
def test_where_the_trainer_asks_for_the_kernel(name, asked, make_model, tokenizer, prompts, tmp_path, monkeypatch):
    """On CUDA with Triton; here the kernel refuses, and the plain path follows."""
    seen = []
    monkeypatch.setattr("bandpo.terms._runs_triton", lambda device: True)
    monkeypatch.setattr(kernel, "clipped_objective", lambda *_: seen.append(1))
    from bandpo.zoo import OBJECTIVES

    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=OBJECTIVES[name], loss_type="grpo")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout(tokenizer))  # a step with the full metrics
    assert bool(seen) == asked
    x = torch.full((2, 3), -0.5, requires_grad=True)
    policy_loss(logprobs=x, old_logprobs=x.detach(), advantages=torch.ones(2), mask=torch.ones(2, 3), objective=name)
    assert seen
