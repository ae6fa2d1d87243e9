"""Rows that are too long: found as by tokenizing each by itself, once, and without tokenizing what is short enough."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bandpo.train import data as run_data
from bandpo.train.data import fit_window, load_prompts, split_prompts
from bandpo.train.lengths import TokenLimits, long_rows, tokens_of_a_byte

TEXTS = ["the cat sat on the mat", "a longer line, of 12 words or so", "élan ▁ 日本"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def byte_level(*, prefix=False, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence_piece(*, mark=True):
    """As Llama 2: a mark for each space and before the text, and bytes for characters that are not known."""
    known = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdet", *(["▁"] if mark else [])]
    merges = [("a", "b")]
    vocabulary = {entry: i for i, entry in enumerate([*known, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level(),
    "bytes, a space first": byte_level(prefix=True),
    "bytes, NFC": byte_level(normalizer=normalizers.NFC()),
    "marks": sentence_piece(),
}


@given(
    st.sampled_from(list(TOKENIZERS)),
    st.text(max_size=30) | st.sampled_from(["\U0001d160" * 9, "क़" * 9, "é" * 5, " " * 9]),
)
def test_no_text_has_more_tokens_than_its_bytes_allow(name, text):
    tokenizer = TOKENIZERS[name]
    in_ascii, elsewhere = tokens_of_a_byte(json.loads(tokenizer.to_str()))
    most = (in_ascii if text.isascii() else elsewhere) * len(text.encode())
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= most or not text


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(normalizer=normalizers.NFKC()), byte_level(normalizer=normalizers.Lowercase()), sentence_piece(mark=False),
     Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))],
    ids=["NFKC", "lower case", "a mark of three bytes", "words"],
)  # fmt: skip
def test_no_bound_is_claimed_where_none_is_known(tokenizer):
    assert tokens_of_a_byte(json.loads(tokenizer.to_str())) is None


class Own(PreTrainedTokenizerFast):
    """A class that is not of transformers may encode in any way."""


def tokenizer_of(name, cls=PreTrainedTokenizerFast):
    return cls(tokenizer_object=TOKENIZERS[name], pad_token="<s>", chat_template=TEMPLATE)


@pytest.mark.parametrize("cls", [PreTrainedTokenizerFast, Own])
@pytest.mark.parametrize("name", ["bytes", "bytes, NFC"])
def test_the_rows_are_those_of_single_calls(name, cls):
    tokenizer = tokenizer_of(name, cls)
    texts = [t[:n] for t in (*TEXTS, "\U0001d160" * 9, "क़" * 9) for n in range(1, 30)]
    limits = TokenLimits(tokenizer)
    for limit in (1, 4, 9, 40):
        for special in (True, False):
            expected = [len(tokenizer(t, add_special_tokens=special)["input_ids"]) > limit for t in texts]
            assert limits.exceeded(limit, texts, special=special) == expected
    chats = [[{"role": "user", "content": t}] for t in texts]
    lengths = [
        len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"]) for c in chats
    ]
    said = []
    kept = fit_window(Dataset.from_dict({"prompt": chats}), tokenizer, 40, 20, skip_bad=True, say=said.append)
    assert list(kept["prompt"]) == [c for c, n in zip(chats, lengths, strict=True) if n <= 20]
    long = [i for i, n in enumerate(lengths) if n > 20]
    assert f"{len(long)} rows are longer than 20 tokens" in said[0] and f"the first is row {long[0] + 1}" in said[0]


def test_only_what_may_be_too_long_is_tokenized_and_only_once(tmp_path, monkeypatch):
    """Counts of what reaches the tokenizer, and of passes over the data, of a file that is opened twice."""
    tokenizer = tokenizer_of("bytes")
    texts = ["short"] * 2500 + ["a long text " * 9]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    seen, passes = [], []
    call = PreTrainedTokenizerFast._encode_plus
    encode = lambda self, text, *args, **kwargs: seen.append(text) or call(self, text, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", encode)
    measure = run_data._too_long
    monkeypatch.setattr(
        run_data, "_too_long", lambda prompts, *a, **k: passes.append(len(prompts)) or measure(prompts, *a, **k)
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    said = []
    for _ in range(2):
        data = load_prompts(
            str(tmp_path / "rows.jsonl"), config=None, split="train", prompt_column="prompt", answer_column="answer",
            system_prompt=None, chat=True,
        )  # fmt: skip
        assert len(fit_window(data, tokenizer, 100, 40, skip_bad=True, say=said.append)) == 2500
    assert passes == [1000, 1000, 501]  # in batches; the second time they are read from the cache
    assert seen == [["<user>" + texts[-1] + "\na:"]]
    assert said[0] == said[1]
    fit_window(data, tokenizer, 101, 40, skip_bad=True, say=said.append)
    assert len(passes) == 6  # another limit is another question


def test_a_failure_is_raised_after_the_others_may_go_on():
    def measure(prompts):
        raise RuntimeError("the template refuses")

    with pytest.raises(RuntimeError, match="the template refuses"):
        long_rows(Dataset.from_dict({"prompt": ["a"]}), ["prompt"], measure, ["test"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh") | st.text(max_size=2), min_size=3, max_size=40), st.integers(0, 3))
def test_held_out_prompts_are_those_of_a_dictionary_of_prompts(prompts, seed):
    prompts = [p.encode("utf-8", "replace").decode() for p in prompts]
    data = Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    if len(groups) <= 2:
        with pytest.raises(ValueError, match=f"has {len(groups)} different prompts; holding out 2"):
            split_prompts(data, 2, seed)
        return
    train, held_out = split_prompts(data, 2, seed)
    order = np.random.default_rng(seed).permutation(len(groups))  # as `Dataset.shuffle`
    rows = list(groups.values())
    assert held_out["row"][:] == [rows[i][0] for i in order[:2]]
    assert train["row"][:] == sorted(j for i in order[2:] for j in rows[i])
