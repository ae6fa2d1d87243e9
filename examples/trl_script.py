"""A complete training script with TRL: chat template, two weighted rewards, LoRA, evaluation, checkpoints, resume, doctor.

    python examples/trl_script.py --output runs/trl            # train
    python examples/trl_script.py --output runs/trl --resume   # continue after an interruption, or with more --steps

Needs `pip install 'bandpo[trl]' peft`. Nothing is downloaded: the model is made here, so that the script runs anywhere in
less than a minute. For a real model change one line: `model = "Qwen/Qwen2.5-0.5B-Instruct"`, or the path of a folder.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer, DoctorCallback

# ---- The data: conversations, and a column with the answer that the rewards are given.

SYSTEM = "answer with one digit"


def questions(count: int, seed: int) -> Dataset:
    """Sums of two digits, of which the answer is the last digit."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{a}+{b}"}],
                "answer": str((a + b) % 10),
            }
            for a, b in pairs
        ]
    )


# ---- The rewards: each gets all completions, as conversations, and the columns of the data by name.


def correct(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1 where the first character is the answer."""
    return [float(c[0]["content"][:1] == right) for c, right in zip(completions, answer, strict=True)]


def form(completions: list[list[dict[str, str]]], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of digits in the text, less for each token after the digit and the end."""
    texts = [c[0]["content"] for c in completions]
    digits = [sum(x.isdigit() for x in text) / max(len(text), 1) for text in texts]
    return [share - 0.25 * max(len(ids) - 2, 0) for share, ids in zip(digits, completion_ids, strict=True)]


# ---- A tiny model with a chat template. With a real model all of this goes away.


def tiny_model(folder: Path) -> str:
    """Write a model of random weights and its tokenizer, one token for each character, into a folder."""
    special = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
    characters = [*"0123456789+ abcdefghijklmnopqrstuvwxyz", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    characters_to_tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters_to_tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters_to_tokens.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters_to_tokens,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=special[2:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                initializer_range=0.2,  # large enough for LoRA to change what random weights say
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- The run.


def main(arguments: list[str] | None = None) -> BandGRPOTrainer:
    """Train, evaluate and save; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/trl"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of the whole run")
    parser.add_argument("--save_steps", type=int, default=10, help="steps between two checkpoints and evaluations")
    parser.add_argument("--resume", action="store_true", help="continue from the last whole checkpoint of the folder")
    parser.add_argument("--report_to", default="none", help="a tracker: tensorboard, wandb, trackio; none by default")
    options = parser.parse_args(arguments)

    model = tiny_model(options.output / "base")  # a real one: model = "Qwen/Qwen2.5-0.5B-Instruct"

    args = BandGRPOConfig(
        output_dir=str(options.output),
        # The trust region. A rollout must be used for several steps: at the first one every ratio is 1, and nothing is clipped.
        objective="bandpo-kl",
        radius=0.05,
        num_iterations=2,
        # The rollout: 8 completions for each of 8 prompts.
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=4,
        temperature=1.0,
        reward_weights=[1.0, 0.5],  # in the order of `reward_funcs`
        # The optimiser. A real model wants a rate of about 1e-5 with LoRA.
        max_steps=options.steps,
        learning_rate=5e-3,
        lr_scheduler_type="constant",  # so that a run that is resumed with more steps is the same run
        seed=0,
        # Evaluation, checkpoints and the log.
        eval_strategy="steps",
        eval_steps=options.save_steps,
        eval_on_start=not options.resume,
        per_device_eval_batch_size=64,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=2,
        report_to=options.report_to,
        disable_tqdm=True,
        # This script is for a CPU. On a GPU leave these three out.
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = BandGRPOTrainer(
        model=model,
        reward_funcs=[correct, form],
        args=args,
        train_dataset=questions(512, seed=1),
        eval_dataset=questions(16, seed=2),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[DoctorCallback()],  # tells a warning once, with its cause and what to change
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.output / "model"))  # the adapter, its tokenizer and the model card

    for row in trainer.state.log_history:
        if "eval_reward" in row:
            print(f"step {row['step']:>4}: reward on held-out questions {row['eval_reward']:.3f}")
    print(f"model: {options.output / 'model'}")
    return trainer


if __name__ == "__main__":
    main()
