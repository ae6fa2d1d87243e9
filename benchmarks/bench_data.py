"""Data before and beside the training: datasets, packing, history of pruning, statistics of runs, reward math."""

import contextlib
import io
import json
import random
import time

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.rewards import accuracy_reward

from bandpo.integrations.trl import packing as trl_packing
from bandpo.selection import Pruning, pack_rows, window_pack
from bandpo.statistics import interval
from bandpo.train import verification
from bandpo.train.data import fit_window, load_prompts, split_prompts

WORDS = [f"{random.Random(i).getrandbits(24):x}" for i in range(3000)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def text(seed):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(40))


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a chat template, as most models have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        map(text, range(1000)),
        trainers.BpeTrainer(
            vocab_size=8000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|end|>", chat_template=TEMPLATE)


@pytest.mark.parametrize("again", [False, True], ids=["first time", "resumed"])
def test_dataset(compare, report, tokenizer, tmp_path, monkeypatch, again):
    """A window of 4096 and prompts of about 130 tokens in a chat template."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    sizes, count = (1000, 4000, 16_000), iter(range(1000))

    def make(size):
        lines = [json.dumps({"prompt": text(i), "answer": "1"}) + "\n" for i in range(size)]

        def new_file(name):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(lines))
            return str(path)

        def ours(path=None):
            data = load_prompts(
                path or new_file(f"ours-{next(count)}"), config=None, split="train", prompt_column="prompt",
                answer_column="answer", system_prompt=None, chat=True,
            )  # fmt: skip
            split_prompts(fit_window(data, tokenizer, 4096, 1024, skip_bad=True), 256, 0)

        def plain(path=None):
            datasets.load_dataset("json", data_files=path or new_file(f"plain-{next(count)}"), split="train")

        if not again:
            return {"ours": ours, "load_dataset alone": plain}
        one, other = new_file(f"one-{size}"), new_file(f"other-{size}")
        return {"ours": lambda: ours(one), "load_dataset alone": lambda: plain(other)}

    what = f"Dataset until training, {'resumed' if again else 'first time'}"
    found = compare(what, make, sizes, rounds=2)
    more = (found["ours"][-1] - found["load_dataset alone"][-1]) / sizes[-1] * 1e6
    report(f"{what}: more than loading it", more, "µs a row", "<= 30")


@pytest.mark.parametrize("whole", [False, True], ids=["window of 8", "whole input as window"])
def test_packer(compare, whole):
    def make(size):
        draw = random.Random(0)
        lengths = [min(8192, 1 + int(draw.lognormvariate(5.6, 0.8))) for _ in range(size)]

        def in_order():
            bins, room = [], 0
            for i, length in enumerate(lengths):
                if length > room:
                    bins.append([])
                    room = 8192
                bins[-1].append(i)
                room -= length

        return {"ours": lambda: window_pack(lengths, 8192, size if whole else 8), "in order, first fit": in_order}

    compare(f"Packer, {'whole input as window' if whole else 'window of 8'}", make, (300, 1000, 3000), rounds=5)


MEMORY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from bandpo.integrations.trl import packing as p
from bandpo.selection import pack_rows
torch.set_num_threads(1)
width, how = int(sys.argv[1]), sys.argv[2]
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     attn_implementation="sdpa")
model = LlamaForCausalLM(config)
lengths = torch.tensor([width, width, width // 2, width // 4] * 2)
mask = torch.arange(width) < lengths.unsqueeze(1)
ids = torch.ones(mask.shape, dtype=torch.long)
packed = pack_rows(ids, mask, capacity=4 * width)
with torch.no_grad():
    model(input_ids=ids[:1, :8])
    START()
    if how == "none":
        model(input_ids=ids, attention_mask=None, use_cache=False)
    elif hasattr(p, "Layout"):
        p.Layout(packed, config).forward(model)
    else:
        model(**p._inputs(packed, config))
"""


def test_memory_of_packed_attention(report, peak_memory):
    sizes = (512, 1024, 2048)
    ours, none = ([peak_memory(MEMORY, width, how)[0] for width in sizes] for how in ("ours", "none"))
    growth = float(np.polyfit(np.log(sizes), np.log(ours), 1)[0])
    ratios = [round(a / b, 3) for a, b in zip(ours, none, strict=True)]
    note = f"{ours[-1] / 2**20:.0f} MiB for 8 sequences of up to 2048 tokens; growth {growth:.2f}"
    more = {"equivalent": "padded, no mask", "sizes": list(sizes), "ratios": ratios, "growth": round(growth, 2)}
    report("Memory of a packed forward pass", ratios[-1], "x", "<= 1.2", note, **more)


def test_time_of_packed_attention(compare):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def make(width):
        lengths = torch.exp(torch.randn(32) * 0.8).mul(width / 8).long().clamp(1, width)
        mask = torch.arange(width) < lengths.unsqueeze(1)
        ids = torch.randint(1, 256, mask.shape) * mask

        def ours():
            packed = pack_rows(ids, mask, capacity=4 * width)
            if hasattr(trl_packing, "Layout"):
                trl_packing.Layout(packed, config).forward(model).logits.sum().backward()
            else:
                model(**trl_packing._inputs(packed, config)).logits.sum().backward()

        def padded():
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.sum().backward()

        return {"ours": ours, "padded": padded}

    compare("Packed micro-batch, forward and backward", make, (128, 256, 512), rounds=3)


def test_history_in_a_checkpoint(report):
    sizes, found, plain = (1000, 10_000, 100_000), [], []
    for size in sizes:
        prune = Pruning(prompts=0.5)
        prompts = [f"{text(i % 100)} {i}" for i in range(size)]
        prune.update(prompts, torch.rand(size, 4))
        for state, into in ((prune.state_dict(), found), (torch.zeros(size, dtype=torch.float64), plain)):
            file = io.BytesIO()
            torch.save(state, file)
            into.append(file.tell() / size)
    more = {"equivalent": "scores alone", "sizes": list(sizes)}
    more["ratios"] = [round(a / b, 3) for a, b in zip(found, plain, strict=True)]
    report("History of pruning in a checkpoint", found[-1], "B a prompt", "<= 25", **more)


def test_choice_of_prompts(compare):
    """A rollout of 64 prompts, with a history of all prompts of the dataset."""

    def make(size):
        prune = Pruning(prompts=0.5)
        keys = [str(i) for i in range(size)]
        for i in range(0, size, 10_000):
            prune.update(keys[i : i + 10_000], torch.rand(min(size, 10_000), 2))
        scores = torch.rand(size, dtype=torch.float64)
        return {"ours": lambda: prune.select_prompts(keys[:64]), "mean of the scores": scores.mean}

    compare("Choice of 64 prompts by their history", make, (1000, 10_000, 100_000), rounds=5, note="growth counts")


def test_statistics_of_one_arm(compare):
    def make(size):
        values = np.random.default_rng(0).normal(size=size)

        def plain():
            draws = np.random.default_rng(0).integers(0, size, (9999, size))
            return np.quantile(np.sort(values[draws], 1)[:, size // 4 : size - size // 4].mean(1), [0.025, 0.975])

        return {"ours": lambda: interval(values), "percentile bootstrap in numpy": plain}

    compare("Statistics of one arm", make, (10, 100, 1000), rounds=2)


def test_memory_of_statistics(report, peak_memory):
    script = "import sys, numpy as np\nfrom bandpo.statistics import interval, paired\n"
    script += "x = list(np.random.default_rng(0).normal(size=int(sys.argv[1])))\ninterval(x[:9])\nSTART()\n"
    script += "interval(x); paired({'a': (x, [0.0] * len(x))})"
    sizes = (100, 300, 1000)
    found = [peak_memory(script, size)[0] / 2**20 for size in sizes]
    growth = float(np.polyfit(np.log(sizes), np.log(found), 1)[0])
    more = {"sizes": list(sizes), "growth": round(growth, 2)}
    report("Memory of the statistics of one arm of 1000 seeds", found[-1], "MiB", "<= 64", **more)


def test_reward_for_mathematics(compare):
    """One worker, beside TRL's reward in this process. Wall time, since the work is done in another process."""

    def verify(pairs):
        if hasattr(verification, "default_workers"):
            return verification.verify_all(pairs, workers=1)
        with contextlib.suppress(AttributeError):
            verification._WORKERS = 1
        return verification.verify_all(pairs)

    def make(size):
        answers = [rf"\frac{{{i % 50}}}{{7}}" for i in range(size)]
        texts = [rf"so it is $\boxed{{\frac{{{i}}}{{7}}}}$" for i in range(size)]
        messages = [[{"role": "assistant", "content": t}] for t in texts]
        in_dollars = [f"${a}$" for a in answers]
        return {
            "ours": lambda: verify(list(zip(texts, answers, strict=True))),
            "TRL's accuracy_reward": lambda: accuracy_reward(messages, in_dollars),
        }

    compare(
        "Reward math, one worker", make, (16, 64, 256), rounds=2, target="<= 1.1", clock=time.perf_counter,
        note="50 different answers",
    )  # fmt: skip
