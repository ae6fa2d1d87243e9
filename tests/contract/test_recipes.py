"""recipes/trl: accelerate reads its files, `bandpo train` the others, and the numbers are the paper's."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from bandpo import KL, Band
from bandpo.train.config import parse

RECIPES = Path(__file__).parents[2] / "recipes" / "trl"


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("fsdp2", "FSDP", 8), ("deepspeed_zero3", "DEEPSPEED", 8), ("two_cpus", "MULTI_GPU", 2)],
)
def test_accelerate_reads_it(name, kind, processes):
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.distributed_type.value.upper() == kind
    assert config.num_processes == processes
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert config.deepspeed_config.get("zero_stage") == (3 if kind == "DEEPSPEED" else None)


@pytest.mark.parametrize("name", ["paper", "paper_server"])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-3B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"])
def test_the_paper_s_setting(name, model, monkeypatch):
    # transformers refuses bf16 on a machine that cannot compute in it; these files are for GPUs
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    run, args, _ = parse(["--config", str(RECIPES / f"{name}.yaml"), "--model", model])
    assert run.model == model
    assert args.resolve().bounds == Band(KL, 0.05, max_ratio=10.0)
    assert (args.delta, args.beta, args.learning_rate, args.weight_decay) == (10.0, 0.001, 1e-6, 0.01)
    assert (args.loss_type, args.scale_rewards, args.num_iterations) == ("grpo", "group", 1)
    step = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert step == 64 * args.num_generations
    assert args.steps_per_generation == 4 * args.gradient_accumulation_steps
    assert args.use_vllm and args.vllm_mode == ("colocate" if name == "paper" else "server")
