"""Packed against padded: forward and backward of one micro-batch of long-tailed lengths, on a small Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import split_tensor_dict

from bandpo.integrations.trl.selection import PrunedRollouts
from bandpo.selection import Pruning, density, pack_rows, packed_logprobs, window_pack
from bandpo.train import command as job
from bandpo.train import grpo


def test_packed_forward_and_backward(paired, report):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    lengths = torch.exp(4.0 + 0.8 * torch.randn(64)).long().clamp(4, 256)
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, 512, mask.shape) * mask

    def padded():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        (chosen * mask[:, 1:]).sum().backward()

    def packed():
        call = lambda **kwargs: model(**kwargs, use_cache=False).logits  # noqa: E731
        packed_logprobs(call, ids, mask, capacity=512, check=False).sum().backward()

    found = paired({"padded": padded, "packed": packed}, rounds=7)
    bins = pack_rows(ids, mask, capacity=512).input_ids
    note = f"density {mask.sum() / mask.numel():.2f} padded, {mask.sum() / bins.numel():.2f} packed"
    report("Padded over packed micro-batch, forward and backward", found["padded"] / found["packed"], "x", "", note)


def test_density(report):
    torch.manual_seed(0)
    lengths = torch.exp(5.6 + 0.8 * torch.randn(2000)).long().clamp(1, 1024).tolist()
    for window in (1, 8, 32):
        value = density(lengths, window_pack(lengths, 2048, window), 2048)
        report(f"Density of window packing, window {window}", value, "", ">= 0.97" if window >= 8 else "")


def test_update_phase_of_the_main_job(tmp_path, monkeypatch, paired, report):
    """One rollout of the default job, all of its micro-batches forward and backward: whole, pruned, packed."""
    seen = {}

    class Watched(grpo._Trainer):
        def _chosen_rollout(self, inputs):
            rollout = super()._chosen_rollout(inputs)
            seen.update(trainer=self, inputs=inputs, rollout=rollout, rewards=self.last_rewards)
            return rollout

    monkeypatch.setattr(grpo, "_Trainer", Watched)
    job.train(
        ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--save_strategy", "no", "--eval_prompts", "8"]
    )
    trainer, rollout = seen["trainer"], seen["rollout"]
    trainer.model.train()
    trainer.state.global_step = 0  # the run is over, and pruning with it
    rows = len(rollout["advantages"])

    def pruned(rate):
        select = PrunedRollouts(trainer, Pruning(completions=rate))
        trainer.last_rewards = seen["rewards"]
        return select.after(seen["inputs"], dict(rollout), [1.0] * rows)

    def update(batch, packing):
        def run():
            trainer.args.packing = packing
            for part in split_tensor_dict(batch, trainer.args.steps_per_generation):
                trainer._compute_loss(trainer.model, part).backward()

        return run

    batches = {"full": rollout, "pruned 0.5": pruned(0.5), "pruned 0.7": pruned(0.7)}
    cases = {name: update(batch, False) for name, batch in batches.items()}
    cases |= {"packed": update(rollout, True), "pruned 0.5, packed": update(batches["pruned 0.5"], True)}
    found = paired(cases, rounds=9)
    for name in list(cases)[1:]:
        kept = len(batches.get(name.removesuffix(", packed"), rollout)["advantages"]) / rows
        note = f"{found[name]:.2f} s of {found['full']:.2f} s, {kept:.2f} of the rows"
        target = ">= 1.5" if name == "pruned 0.5, packed" else ""
        report(f"Main job's update phase, full over {name}", found["full"] / found[name], "x", target, note)
