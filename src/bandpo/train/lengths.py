"""Which rows of a dataset are longer than a limit in tokens: read in batches, once on each machine, and cached by content."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import transformers
from accelerate import PartialState
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

Result = TypeVar("Result")
Measure = Callable[..., list[bool]]
"""Whether each row of a batch of columns is too long; called with the columns as lists."""

_FLAG = "is too long"
_SPACE = "\u2581"
"""The mark for a space of SentencePiece."""
_ONLY_SPLIT = ("Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer")


def first_on_each_machine(work: Callable[[], Result]) -> Result:
    """Do work whose result is cached on disk: in the first process of each machine, then in the others, which read the cache.

    Args:
        work: The work. If it raises, it does so in every process.

    Returns:
        The result.
    """
    failed: Exception | None = None
    result: Result | None = None
    with PartialState().local_main_process_first():
        try:
            result = work()
        except Exception as error:  # raised after the barrier, at which the other processes wait
            failed = error
    if failed is not None:
        raise failed
    return cast("Result", result)


def fingerprint(data: Dataset, *parts: object) -> str:
    """The name in the cache of what is made from a dataset.

    Args:
        data: The dataset.
        *parts: What the result depends on besides the data.
    """
    return Hasher.hash([data._fingerprint, *parts])  # pyright: ignore[reportPrivateUsage]


def long_rows(data: Dataset, columns: Sequence[str], measure: Measure, key: Sequence[object]) -> list[int]:
    """The rows that a measure finds too long.

    Args:
        data: The dataset.
        columns: Names of the columns that the measure is given.
        measure: Whether each row of a batch is too long.
        key: What the result depends on besides the data, for the cache.

    Returns:
        Numbers of the rows, ascending.
    """

    def flagged() -> Dataset:
        return data.map(
            lambda *batch: {_FLAG: measure(*batch)},  # pyright: ignore[reportUnknownLambdaType]
            batched=True,
            input_columns=list(columns),
            remove_columns=data.column_names,
            new_fingerprint=fingerprint(data, list(columns), *key),
            desc="Looking for rows that are too long",
        )

    flags = first_on_each_machine(flagged).with_format("numpy")
    at, found = 0, list[int]()
    for batch in cast("Iterator[dict[str, Any]]", flags.iter(100_000)):
        part = batch[_FLAG]
        found += (part.nonzero()[0] + at).tolist()
        at += len(part)
    return found


class TokenLimits:
    """Tells texts that have more tokens than a limit, without tokenizing those that are too short for it.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.key: list[object] = [type(tokenizer).__qualname__, transformers.__version__, tokenizer.chat_template]
        """What the tokens of a text depend on, as plain values."""
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            vocabulary = sorted(tokenizer.get_vocab().items())
            self.key += [tokenizer.name_or_path, vocabulary, repr(tokenizer.init_kwargs)]
            self._growth = None
            return
        state = cast("dict[str, Any]", json.loads(tokenizer.backend_tokenizer.to_str()))
        lasting = {name: part for name, part in state.items() if name not in ("padding", "truncation")}
        self.key += [json.dumps(lasting, sort_keys=True), repr(tokenizer.special_tokens_map)]
        self._growth = None if _is_changed(tokenizer) else tokens_of_a_byte(state)
        self._added = tokenizer.num_special_tokens_to_add()

    def exceeded(self, limit: int, texts: list[str], *, special: bool) -> list[bool]:
        """Whether each text has more tokens than a limit.

        Args:
            limit: Number of tokens.
            texts: The texts.
            special: Whether the tokenizer adds its special tokens.
        """
        asked = [i for i, text in enumerate(texts) if not self._fits(text, limit)]
        found = [False] * len(texts)
        if asked:
            ids = self._tokenizer([texts[i] for i in asked], add_special_tokens=special)["input_ids"]
            for i, tokens in zip(asked, ids, strict=True):
                found[i] = len(tokens) > limit
        return found

    def _fits(self, text: str, limit: int) -> bool:
        """Whether the length of a text alone proves that its tokens are within the limit."""
        if self._growth is None:
            return False
        ascii_growth, growth = self._growth
        most = ascii_growth * len(text) if text.isascii() else growth * len(text.encode("utf-8", "surrogatepass"))
        return most + self._added <= limit


def tokens_of_a_byte(state: dict[str, Any]) -> tuple[int, int] | None:
    """The largest number of tokens for each byte of an ASCII text, and of any other one; None where no bound is known.

    BPE and unigram models give at most one token for each character that they read, or for each of its bytes. The steps before
    them may add characters. Those are accepted whose growth is known: NFC (none for ASCII, else 3 times at most; Unicode,
    UAX 15), the space or "▁" before a piece of text (2 times at most, since no piece is empty), "▁" in place of a space (none,
    if it is in the vocabulary), and the steps that only split. Special tokens around the text are not counted.

    Args:
        state: The tokenizer as the `tokenizers` library writes it.
    """
    steps = [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]
    kinds = {step["type"] for step in steps}
    model = state["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return None
    if _SPACE in json.dumps(steps, ensure_ascii=False):
        known = {entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]}
        if _SPACE not in known or "ByteLevel" in kinds:
            return None
    in_ascii = elsewhere = 1
    for step in steps:
        growth = _growth(step)
        if growth is None:
            return None
        in_ascii, elsewhere = in_ascii * growth[0], elsewhere * growth[1]
    return in_ascii, elsewhere


def _growth(step: dict[str, Any]) -> tuple[int, int] | None:
    """How many times longer one step makes an ASCII text and any other text, at most; None where that is not known."""
    kind = step["type"]
    if kind == "NFC":
        return 1, 3
    if kind in _ONLY_SPLIT or (kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE):
        return 1, 1
    if kind == "Prepend" and step["prepend"] in (" ", _SPACE):
        return 2, 2
    if kind == "ByteLevel" or (kind == "Metaspace" and step["replacement"] == _SPACE):
        puts = step.get("add_prefix_space", False) or step.get("prepend_scheme", "never") != "never"
        return (2, 2) if puts else (1, 1)
    return None


def _steps(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """A normalizer or a pre-tokenizer as a list of single steps."""
    if step is None:
        return []
    return (
        [one for child in step[children] for one in _steps(child, children)] if step["type"] == "Sequence" else [step]
    )


def _is_changed(tokenizer: Any) -> bool:
    """Whether the class of a tokenizer is not of transformers, or encodes in a way of its own."""
    cls, base = cast("type[Any]", type(tokenizer)), cast("type[Any]", PreTrainedTokenizerFast)
    own = any(getattr(cls, name, None) is not getattr(base, name, None) for name in ("__call__", "_encode_plus"))
    return own or not cls.__module__.startswith("transformers.")
