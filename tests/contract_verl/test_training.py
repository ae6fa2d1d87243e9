"""verl's own training loop with our loss: two Ray workers, FSDP2 over gloo, a tiny model, on the CPU."""

import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """Share of even characters: every group of random text has a signal."""
    return sum(ord(c) % 2 == 0 for c in solution_str) / max(len(solution_str), 1)
'''


def prepare(folder):
    """A tiny model with a tokenizer of bytes, prompts, and a reward."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for c in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(c, len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    draw = random.Random(0)
    rows = [
        {"data_source": "toy", "prompt": [{"role": "user", "content": f"{(d := draw.randrange(10))}?"}], "ability": "toy",
         "reward_model": {"style": "rule", "ground_truth": str(d)}, "extra_info": {"index": i, "split": "train"}}
        for i in range(64)
    ]  # fmt: skip
    for name in ("train", "val"):
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    (folder / "reward.py").write_text(REWARD)


def train(folder, *options, workers=2, steps=3):
    actor = "actor_rollout_ref.actor"
    fp32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    command = [
        sys.executable, "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet", f"data.val_files={folder}/val.parquet", "data.train_batch_size=8",
        "data.max_prompt_length=8", "data.max_response_length=8", "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={folder}/model", "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False", f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size=4", f"{actor}.ppo_micro_batch_size_per_gpu=8", f"{actor}.optim.lr=1e-2",
        f"{actor}.use_torch_compile=False", f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.model_dtype=fp32", f"+{actor}.fsdp_config.mixed_precision={fp32}",
        f"{actor}.loss_agg_mode=seq-mean-token-mean", "actor_rollout_ref.rollout.name=cpu", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1", f"actor_rollout_ref.rollout.n_gpus_per_node={workers}",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16", "actor_rollout_ref.rollout.agent.num_workers=1",
        "actor_rollout_ref.rollout.load_format=auto", "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.rollout.free_cache_engine=False", f"reward.custom_reward_function.path={folder}/reward.py",
        "reward.num_workers=1", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.logger=[console]", "trainer.nnodes=1", f"trainer.n_gpus_per_node={workers}", "trainer.device=cpu",
        "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1",
        f"trainer.total_training_steps={steps}", "trainer.resume_mode=disable", "ray_kwargs.ray_init.num_cpus=32",
        f"+ray_kwargs.ray_init.num_gpus={workers}", "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=300000000", *options,
    ]  # fmt: skip
    environment = {
        **os.environ, "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1",
        "RAY_DEDUP_LOGS": "0",
    }  # fmt: skip
    found = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=400
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-6000:]
    rows = {}
    for line in found.stdout.splitlines():
        if match := re.search(r"step:(\d+) - (.*)", line):
            pairs = re.findall(r"([\w/@.:<>=-]+?):([-+\d.einfa()npfloat64]+)(?: - |$)", match[2])
            rows[int(match[1])] = dict(pairs)
    return rows, found.stdout


@pytest.mark.slow
def test_verl_trains_with_a_band(tmp_path):
    prepare(tmp_path)
    policy_loss = "actor_rollout_ref.actor.policy_loss"
    rows, log = train(
        tmp_path, f"{policy_loss}.loss_mode=bandpo", f"{policy_loss}._target_=bandpo.integrations.verl.BandPolicyLossConfig",
        f"+{policy_loss}.objective=bandpo-tv", f"+{policy_loss}.radius=0.0001",
    )  # fmt: skip
    assert sorted(rows) == [1, 2, 3], log[-3000:]

    def value(step, name):
        return float(re.sub(r"np\.float64\(|\)", "", rows[step][name]))

    for step in rows:
        assert math.isfinite(value(step, "actor/pg_loss"))
        assert 0 <= value(step, "actor/band/clip_fraction/any") <= 1
    # Two mini-batches a rollout: the first is on policy; in the second one a radius of 0.0001 binds whatever was sampled.
    assert max(value(step, "actor/band/clip_fraction/any") for step in rows) > 0
    assert max(abs(value(step, "actor/ppo_kl")) for step in rows) > 0


@pytest.mark.slow
def test_the_doctor_watches_verl_s_own_loss(tmp_path, monkeypatch):
    """One mini-batch for each rollout, with verl's own loss: inert. It is told once, in the third step."""
    prepare(tmp_path)
    monkeypatch.setenv("BANDPO_DOCTOR", "patience=3")
    rows, log = train(tmp_path, "actor_rollout_ref.actor.ppo_mini_batch_size=8", workers=1, steps=4)
    assert sorted(rows) == [1, 2, 3, 4], log[-3000:]
    told = [line for line in log.splitlines() if ", doctor: " in line]
    [clipping] = [line for line in told if "doctor: clipping: " in line]
    assert "step 3, doctor: clipping: actor/pg_clipfrac is 0 in all 3 rows" in clipping, told
    assert "ppo_epochs=2" in clipping or "more steps for each rollout" in clipping
