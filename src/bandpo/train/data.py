"""The data of a run: prompts of a built-in task, or prompts and pairs of any Hugging Face dataset."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import broadcast_object_list  # pyright: ignore[reportUnknownVariableType]
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray
from transformers import AutoTokenizer
from trl.data_utils import extract_prompt  # pyright: ignore[reportUnknownVariableType]

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import printable
from bandpo.toy.tasks import TASKS, in_chat, make_splits
from bandpo.train.config import MATH, RunConfig
from bandpo.train.lengths import TokenLimits, fingerprint, first_on_each_machine, long_rows
from bandpo.train.names import near_folder
from bandpo.train.verification import unreadable

Say = Callable[[str], None]
_MAX_MODEL_CONFIG_BYTES = 1 << 24
_UNREADABLE = cast(
    "tuple[type[Exception], ...]", (DatasetGenerationError, pa.ArrowInvalid, UnicodeDecodeError, StopIteration)
)
"""What the readers of `datasets` raise on a damaged file; `StopIteration` on an empty one."""
LEFT_OUT = "; they are left out,"
"""What a message about bad rows has, between their number and that of the other rows."""
_UNREADABLE_ANSWER = "is unreadable"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class _BadRows:
    """What happens to rows that cannot be used: they are counted, and removed or refused."""

    whose: str
    """The data, for messages."""
    skip: bool
    say: Say

    def removed(self, data: Dataset, bad: list[int], what: str) -> Dataset:
        """The other rows; an error if there are bad rows and they may not be skipped, or if no row is left."""
        if not bad:
            return data
        counted = f"{self.whose}: {len(bad)} rows {what}, the first is row {bad[0] + 1}"
        if not self.skip:
            raise ValueError(f"{counted}; mend them, or set bad_rows: skip")
        if len(bad) == len(data):
            raise ValueError(f"{counted}; none is left")
        self.say(f"{counted}{LEFT_OUT} {len(data) - len(bad)} are kept")
        gone = set(bad)
        return data.select([i for i in range(len(data)) if i not in gone])


def _values(data: Dataset, name: str) -> Iterator[Any]:
    """The values of a column, read in batches."""
    for batch in cast("Iterator[dict[str, list[Any]]]", data.select_columns([name]).iter(1000)):
        yield from batch[name]


def _mapped(data: Dataset, columns: dict[str, Callable[..., Any]], *inputs: str, **options: Any) -> Dataset:
    """A dataset with new columns, each by a function of the input columns and options; made in batches and cached."""

    def made() -> Dataset:
        return data.map(
            _rows_of,
            batched=True,
            input_columns=list(inputs),
            fn_kwargs={"columns": columns, "options": options},
            remove_columns=list(inputs),
        )

    return first_on_each_machine(made)


def _rows_of(
    *batch: list[Any], columns: dict[str, Callable[..., Any]], options: dict[str, Any]
) -> dict[str, list[Any]]:
    return {name: [f(*row, **options) for row in zip(*batch, strict=True)] for name, f in columns.items()}


def load_task(task: str, evaluation: int, shots: int | None = None) -> tuple[Dataset, Dataset]:
    """Training prompts and held-out prompts of a built-in task.

    Args:
        task: Name of the task.
        evaluation: Number of held-out prompts.
        shots: Number of solved examples in the chat before each question; they are the first training problems, which are not
            trained on. None gives the compact text of the built-in small model.
    """
    splits = make_splits(TASKS[task], evaluation=evaluation)
    train, held_out = cast("tuple[list[dict[str, Any]], list[dict[str, Any]]]", splits)
    if shots is not None:
        examples = splits[0][:shots]
        train, held_out = in_chat(splits[0][shots:], TASKS[task], examples), in_chat(splits[1], TASKS[task], examples)
    return Dataset.from_list(train), Dataset.from_list(held_out)


def checked_shots(run: RunConfig, tokenizer: Any) -> int | None:
    """The number of solved examples of a run.

    Args:
        run: Configuration of the run.
        tokenizer: Tokenizer of the model.

    Raises:
        ValueError: If there are some, and the model has no chat template.
    """
    if run.shots is not None and tokenizer.chat_template is None:
        raise ValueError(
            f"shots={run.shots}: model {run.model!r} has no chat template; leave shots out, or use another model"
        )
    return run.shots


def run_prompts(
    run: RunConfig, tokenizer: Any, window: int | None, *, completion: int, seed: int, say: Say
) -> tuple[Dataset, Dataset]:
    """The prompts that a run trains on and those that it holds out, checked before training.

    Args:
        run: Configuration of the run.
        tokenizer: Tokenizer of the model.
        window: Number of positions of the model; None where it has no limit.
        completion: Number of tokens of the longest completion.
        seed: Seed of the choice of the held-out prompts.
        say: Prints a message.

    Raises:
        ValueError: If a row is bad and bad rows are not skipped, or if no row is left.
    """
    if run.task is not None:
        return load_task(run.task, run.eval_prompts, checked_shots(run, tokenizer))
    assert run.dataset is not None
    data = checked_prompts(run, run.dataset, run.dataset_split, tokenizer, say=say)
    data = fit_window(data, tokenizer, window, completion, skip_bad=run.bad_rows == "skip", say=say)
    if run.eval_dataset is None:
        return split_prompts(data, run.eval_prompts, seed)
    return data, held_out_prompts(run, tokenizer, window, completion=completion, seed=seed, say=say)


def held_out_prompts(
    run: RunConfig, tokenizer: Any, window: int | None, *, completion: int, seed: int, say: Say
) -> Dataset:
    """The prompts that `run_prompts` holds out.

    Args:
        run: Configuration of the run.
        tokenizer: Tokenizer of the model.
        window: Number of positions of the model; None where it has no limit.
        completion: Number of tokens of the longest completion.
        seed: Seed of the choice of the held-out prompts.
        say: Prints a message.
    """
    if run.eval_dataset is None:
        return run_prompts(run, tokenizer, window, completion=completion, seed=seed, say=say)[1]
    data = checked_prompts(run, run.eval_dataset, run.eval_dataset_split, tokenizer, say=say)
    data = fit_window(data, tokenizer, window, completion, skip_bad=run.bad_rows == "skip", say=say)
    return data.select(range(min(run.eval_prompts, len(data))))


def checked_prompts(
    run: RunConfig, name: str, split: str, tokenizer: Any, *, say: Say, first: int | None = None
) -> Dataset:
    """Prompts of a dataset in the form that a run gives them to its model, with answers that its reward can read.

    Args:
        run: Configuration of the run: columns, system prompt, reward, and what to do with bad rows.
        name: Hub name or file of the dataset.
        split: Split of a Hub dataset.
        tokenizer: Tokenizer of the model.
        say: Prints a message.
        first: Use at most so many prompts, the first ones; None for all.

    Raises:
        ValueError: If a row is bad and bad rows are not skipped, or if no row is left.
    """
    skip_bad = run.bad_rows == "skip"
    data = load_prompts(
        name,
        config=run.dataset_config,
        split=split,
        prompt_column=run.prompt_column,
        answer_column=run.answer_column,
        system_prompt=run.system_prompt,
        chat=tokenizer.chat_template is not None,
        skip_bad=skip_bad,
        say=say,
    )
    if first is not None:
        data = data.select(range(min(first, len(data))))
    return with_readable_answers(data, name, skip_bad=skip_bad, say=say) if MATH & set(run.rewards) else data


def with_readable_answers(data: Dataset, name: str, *, skip_bad: bool, say: Say) -> Dataset:
    """The rows whose answer math-verify can read; with another answer no completion would ever get a score.

    Args:
        data: Dataset with the column "answer".
        name: Name of the dataset, for messages.
        skip_bad: Leave the other rows out, and print how many.
        say: Prints a message.

    Raises:
        ValueError: If rows have answers that cannot be read; the message counts them and shows the first.
    """
    bad: list[list[int] | None] = [None]
    if PartialState().is_main_process:
        versions = (version(name) for name in ("math-verify", "sympy", "bandpo"))
        flags = data.map(
            _flag_unreadable,
            batched=True,
            batch_size=None,
            input_columns=["answer"],
            remove_columns=data.column_names,
            new_fingerprint=fingerprint(data, "answers", *versions),
            desc="Reading the answers",
        )
        bad = [[i for i, is_bad in enumerate(_values(flags, _UNREADABLE_ANSWER)) if is_bad]]
    broadcast_object_list(bad)
    [rows] = bad
    assert rows is not None
    answers = {i: cast("dict[str, Any]", data[i])["answer"] for i in rows[:3]}
    shown = ", ".join(dict.fromkeys(printable(repr(answers[i]))[:60] for i in rows[:3]))
    what = f"have an answer that math-verify cannot read as a whole ({shown}{', ...' if len(rows) > 3 else ''})"
    return _BadRows(f"dataset {name!r}", skip_bad, say).removed(data, rows, what)


def _flag_unreadable(answers: list[Any]) -> dict[str, list[bool]]:
    bad = set(unreadable(answers))
    return {_UNREADABLE_ANSWER: [i in bad for i in range(len(answers))]}


def load_tokenizer(name: str, *, trust_remote_code: bool, local: bool = False) -> Any:
    """The tokenizer of a model, padding on the left.

    Args:
        name: Hub name or folder of the model.
        trust_remote_code: Allow running code that the folder contains or names.
        local: Download nothing.

    Raises:
        ValueError: If it cannot be loaded, or if the folder names code and that is not allowed.
    """
    if not trust_remote_code:
        _refuse_code(Path(name))
    try:
        load = cast("Callable[..., Any]", AutoTokenizer.from_pretrained)
        return load(name, padding_side="left", trust_remote_code=trust_remote_code, local_files_only=local)
    except OSError as error:
        near = None if Path(name).exists() else near_folder(name)
        hint = "" if near is None else f"there is no folder of that name; did you mean the folder {near}? "
        raise ValueError(f"model {name!r} cannot be loaded: {hint}{error}") from error


def _refuse_code(folder: Path) -> None:
    """Refuse the folder of a model if it names code that is elsewhere.

    Such code is an attention kernel on the Hub, which transformers downloads and runs, or a module for the layers of an
    adapter, which PEFT imports. The folder that an adapter names as its base is checked too.

    Args:
        folder: Folder of a model or an adapter; a Hub name is no folder and passes.

    Raises:
        ValueError: If it names such code.
    """
    adapter = folder / "adapter_config.json"
    base = _json_of(adapter).get("base_model_name_or_path")
    for path in (folder / "config.json", adapter, *([Path(base) / "config.json"] if isinstance(base, str) else [])):
        for key, value in _nested_items(_json_of(path)):
            kernel = "_implementation" in key and isinstance(value, str) and "/" in value
            if kernel or (key.startswith("megatron_") and value and value != "megatron.core"):
                raise ValueError(
                    f"{path}: {key} names code that is elsewhere, {printable(repr(value))[:80]}; it is used only with "
                    "--trust-remote-code"
                )


def _nested_items(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a dictionary and of all dictionaries in it."""
    found = [content]
    while found:
        for key, value in found.pop().items():
            yield key, value
            if isinstance(value, dict):
                found.append(cast("dict[str, Any]", value))


def _json_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file, or if it holds another value."""
    content: object = parse_json(read_regular(path, _MAX_MODEL_CONFIG_BYTES), str(path)) if path.exists() else None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def window_of(config: Any) -> int | None:
    """The number of positions of a model, None where it has no limit.

    Args:
        config: Configuration of the model.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_prompts(
    name: str,
    *,
    config: str | None,
    split: str,
    prompt_column: str,
    answer_column: str,
    system_prompt: str | None,
    chat: bool,
    skip_bad: bool = False,
    say: Say = print,
) -> Dataset:
    """Read a Hub dataset or a local .jsonl, .json, .parquet or .csv file; its columns become "prompt" and "answer".

    Args:
        name: Hub name or file.
        config: Configuration of a Hub dataset.
        split: Split of a Hub dataset.
        prompt_column: Column with the prompt: text, or a list of messages. `reward_model.ground_truth` is the part
            `ground_truth` of the column `reward_model`.
        answer_column: Column with the reference answer, or a part of a column.
        system_prompt: System prompt of text prompts; None for none.
        chat: Turn text prompts into messages, for models with a chat template.
        skip_bad: Leave rows without a prompt or an answer out, and print how many.
        say: Prints a message.

    Returns:
        A data set with the columns "prompt" and "answer".

    Raises:
        FileNotFoundError: If `name` looks like a file and there is no such file.
        ValueError: If the file cannot be read, a column is missing, or a row lacks a prompt or an answer; the message
            counts them.
    """
    data = _read(name, config, split)
    for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column not in data.column_names and _is_nested(data.features, column):
            data = _with_nested(data, column)
        if column not in data.column_names:
            raise ValueError(
                f"dataset {name!r} has no column {column!r}; set {option} to one of {', '.join(_all_columns(data.features))}"
            )
    bad = _BadRows(f"dataset {name!r}", skip_bad, say)
    for column in (prompt_column, answer_column):
        empty = [i for i, value in enumerate(_values(data, column)) if _is_missing(value)]
        data = bad.removed(data, empty, f"have no {column!r}")
    odd = [i for i, value in enumerate(_values(data, prompt_column)) if not _is_prompt(value)]
    data = bad.removed(data, odd, f"have a {prompt_column!r} that is neither text nor messages")
    for old, new in ((prompt_column, "prompt"), (answer_column, "answer")):
        if old == new:
            continue
        if new in data.column_names:  # TRL and the rewards read the column of this name
            say(f"dataset {name!r}: column {old!r} is used as the {new}, and its column {new!r} is left out")
            data = data.remove_columns(new)
        data = data.rename_column(old, new)
    is_text = isinstance(data.features["prompt"], datasets.Value)
    if isinstance(data.features["prompt"], datasets.List) or (is_text and not chat and not system_prompt):
        return data  # in form already
    others = [name for name in data.column_names if name != "prompt"]
    data = _mapped(data, {"prompt": _in_form}, "prompt", chat=chat, system_prompt=system_prompt)
    return data.select_columns(["prompt", *others])


def _is_nested(features: Any, column: str) -> bool:
    """Whether a name with dots is that of a part of a column, at any depth."""
    for part in column.split("."):
        if not isinstance(features, dict) or part not in features:
            return False
        features = cast("dict[str, Any]", features)[part]
    return "." in column


def _with_nested(data: Dataset, column: str) -> Dataset:
    """A dataset with a part of a column as a further column, under its name with dots."""
    root, *parts = column.split(".")

    def made() -> Dataset:
        options = {"column": column, "parts": parts}
        return data.map(_parts_of, batched=True, input_columns=[root], fn_kwargs=options)

    return first_on_each_machine(made)


def _parts_of(values: list[Any], column: str, parts: list[str]) -> dict[str, list[Any]]:
    for part in parts:
        values = [None if value is None else value.get(part) for value in values]
    return {column: values}


def _all_columns(features: Any, before: str = "") -> list[str]:
    """The names of columns and of their parts."""
    found: list[str] = []
    for name, feature in cast("dict[str, Any]", features).items():
        inner = _all_columns(feature, f"{before}{name}.") if isinstance(feature, dict) else []
        found += inner or [f"{before}{name}"]
    return found


def _in_form(prompt: Any, chat: bool, system_prompt: str | None) -> Any:
    """A prompt in the form that the model gets: messages as they are, text with the system prompt before it."""
    if not isinstance(prompt, str):
        return prompt
    if not chat:
        return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


def fit_window(
    data: Dataset, tokenizer: Any, window: int | None, completion: int, *, skip_bad: bool = False, say: Say = print
) -> Dataset:
    """The prompts that leave room for a completion in the window of the model.

    Args:
        data: Dataset with the column "prompt".
        tokenizer: Tokenizer of the model.
        window: Number of positions of the model; None where it has no limit.
        completion: Number of tokens of the longest completion.
        skip_bad: Leave longer prompts out, and print how many.
        say: Prints a message.

    Raises:
        ValueError: If prompts are too long; the message counts them.
    """
    if window is None:
        return data
    if completion >= window:
        raise ValueError(
            f"max_completion_length={completion} leaves no room for a prompt in the model's window of {window}"
        )
    limit = window - completion
    limits = TokenLimits(tokenizer)

    def measure(prompts: list[Any]) -> list[bool]:
        return _too_long(prompts, tokenizer, limits, limit, add_generation_prompt=True)

    long = long_rows(data, ["prompt"], measure, ["prompts", limit, *limits.key])
    what = f"are longer than {limit} tokens (window {window}, max_completion_length {completion})"
    return _BadRows("prompts", skip_bad, say).removed(data, long, what)


def _too_long(
    prompts: list[Any], tokenizer: Any, limits: TokenLimits, limit: int, *, add_generation_prompt: bool
) -> list[bool]:
    """Whether each prompt, text or messages, has more tokens than the limit, tokenized as TRL does it."""
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    rendered: list[str] = []
    if chats:
        messages = [prompts[i] for i in chats]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    found = [False] * len(prompts)
    for places, strings, special in ((texts, [prompts[i] for i in texts], True), (chats, rendered, False)):
        for i, is_long in zip(places, limits.exceeded(limit, strings, special=special), strict=True):
            found[i] = is_long
    return found


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(_is_message(m) for m in cast("list[Any]", value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    message = cast("dict[str, Any]", value)
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list)


def run_pairs(
    run: RunConfig, held_out: Dataset, tokenizer: Any, window: int | None, *, max_length: int | None, say: Say
) -> Dataset:
    """The pairs that a run trains on, in the form of its held-out prompts.

    Args:
        run: Configuration of the run, which names pairs.
        held_out: Prompts that the run is evaluated on.
        tokenizer: Tokenizer of the model.
        window: Number of positions of the model; None where it has no limit.
        max_length: Number of tokens of the longest prompt and completion; None for no limit.
        say: Prints a message.

    Raises:
        ValueError: If a pair is bad and bad rows are not skipped, or if none is left.
    """
    assert run.pairs is not None
    return load_pairs(
        run.pairs,
        split=run.dataset_split,
        held_out=held_out,
        tokenizer=tokenizer,
        system_prompt=None if run.task else run.system_prompt,
        limit=min((n for n in (max_length, window) if n is not None), default=None),
        skip_bad=run.bad_rows == "skip",
        say=say,
    )


def load_pairs(
    name: str,
    *,
    split: str,
    held_out: Dataset,
    tokenizer: Any,
    system_prompt: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    say: Say = print,
) -> Dataset:
    """Read a dataset of pairs in TRL's preference format: "chosen" and "rejected", with "prompt" or with it inside of both.

    Pairs are brought into the form of the held-out prompts: if those are messages, text becomes messages with the same system
    prompt, so that the chat template is used in training and in the evaluation. A pair is bad if it is too long, if its two
    completions are equal, or if its prompt is held out for the evaluation.

    Args:
        name: Hub name or file.
        split: Split of a Hub dataset.
        held_out: Prompts that the run is evaluated on, with the column "prompt".
        tokenizer: Tokenizer of the model.
        system_prompt: System prompt of the held-out prompts.
        limit: Number of tokens of the longest prompt and completion; None for no limit.
        skip_bad: Leave bad rows out, and print how many.
        say: Prints a message.

    Returns:
        The columns "prompt", "chosen" and "rejected", and the other columns of the dataset.

    Raises:
        FileNotFoundError: If `name` looks like a file and there is no such file.
        ValueError: If a column is missing, the pairs cannot have the form of the held-out prompts, or rows are bad and are not
            skipped; the message counts them.
    """
    data = _read(name, None, split)
    whose = f"pairs {name!r}"
    bad = _BadRows(whose, skip_bad, say)
    for column in ("chosen", "rejected"):
        if column not in data.column_names:
            raise ValueError(f"{whose} have no column {column!r}, only {', '.join(data.column_names)}")
    for column in ("prompt", "chosen", "rejected"):
        if column in data.column_names:
            empty = [i for i, value in enumerate(_values(data, column)) if _is_missing(value)]
            data = bad.removed(data, empty, f"have no {column!r}")
    data = _pairs_in_form_of(held_out, data, whose, tokenizer, system_prompt)
    measured = {repr(prompt) for prompt in _values(held_out, "prompt")}
    leaked = [i for i, prompt in enumerate(_values(data, "prompt")) if repr(prompt) in measured]
    data = bad.removed(data, leaked, "have a held-out prompt, on which the run is evaluated")
    sides = zip(_values(data, "chosen"), _values(data, "rejected"), strict=True)
    data = bad.removed(
        data, [i for i, (a, b) in enumerate(sides) if a == b], "have the same text as chosen and as rejected"
    )
    if limit is None:
        return data
    limits = TokenLimits(tokenizer)

    def measure(prompts: list[Any], *sides: list[Any]) -> list[bool]:
        # A text ends with the token of the end, which is added later.
        most = limit - 1 if isinstance(prompts[0], str) else limit
        whole = ([p + a for p, a in zip(prompts, side, strict=True)] for side in sides)
        found = (_too_long(texts, tokenizer, limits, most, add_generation_prompt=False) for texts in whole)
        return [any(either) for either in zip(*found, strict=True)]

    columns = ["prompt", "chosen", "rejected"]
    long = long_rows(data, columns, measure, ["pairs", limit, *limits.key])
    return bad.removed(
        data, long, f"are longer than {limit} tokens (max_length, or the model's window) and would be cut"
    )


def _pairs_in_form_of(
    held_out: Dataset, data: Dataset, whose: str, tokenizer: Any, system_prompt: str | None
) -> Dataset:
    """Pairs with an explicit prompt, as text or as messages, whichever the held-out prompts are."""
    chat = not isinstance(held_out["prompt"][0], str)
    texts = isinstance(data["chosen"][0], str)
    if not texts and not chat:
        has = "has no chat template" if tokenizer.chat_template is None else "is evaluated on text"
        raise ValueError(f"{whose} hold messages, but the model {has}: give them as text")
    if "prompt" not in data.column_names:
        if texts and chat:
            raise ValueError(
                f"{whose} hold text without a column 'prompt', and the model is evaluated in its chat template: give the "
                "prompt in a column of its own, or messages"
            )
        data = data.map(cast("Callable[..., Any]", extract_prompt))
    mixed = isinstance(data["prompt"][0], str) != texts
    if mixed:
        raise ValueError(f"{whose} mix text and messages in one row: prompt, chosen and rejected must be of one kind")
    if texts and chat:
        data = _mapped(data, {"chosen": _said}, "chosen")
        data = _mapped(data, {"rejected": _said}, "rejected")
    if texts and (chat or system_prompt):
        data = _mapped(data, {"prompt": _in_form}, "prompt", chat=chat, system_prompt=system_prompt)
    ours, theirs = ({_system(p) for p in _values(rows, "prompt")} for rows in (data, held_out))
    if chat and not ours & theirs:
        raise ValueError(
            f"{whose} have the system prompt {next(iter(ours))!r}, the held-out prompts {next(iter(theirs))!r}: the run would "
            "be evaluated in another form than it is trained in; put the same one into both"
        )
    return data


def _said(text: str) -> list[dict[str, str]]:
    """A completion as messages."""
    return [{"role": "assistant", "content": text}]


def _system(prompt: Any) -> str | None:
    """The system prompt of messages, None where there is none."""
    if isinstance(prompt, str) or not prompt or prompt[0]["role"] != "system":
        return None
    return str(prompt[0]["content"])


def names_a_file(name: str) -> bool:
    """Whether the name of a dataset is that of a file, whether it exists or not, and not a name on the Hub.

    Args:
        name: Hub name or file of a dataset.
    """
    return Path(name).suffix in _READERS


def is_file(name: str) -> bool:
    """Whether a dataset of this name is a local file that can be read, so that nothing is downloaded for it.

    Args:
        name: Hub name or file of a dataset.
    """
    return names_a_file(name) and Path(name).is_file()


def _read(name: str, config: str | None, split: str) -> Dataset:
    suffix = Path(name).suffix
    try:
        if suffix not in _READERS:
            return datasets.load_dataset(name, config, split=split)
        if not Path(name).is_file():
            raise FileNotFoundError(f"dataset {name!r}: no such file")
        data = datasets.load_dataset(_READERS[suffix], data_files=name, split="train")
    except _UNREADABLE as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"dataset {name!r} cannot be read as {suffix.lstrip('.')}: {reason}") from error
    if not len(data):
        raise ValueError(f"dataset {name!r} has no rows")
    return data


def split_prompts(data: Dataset, evaluation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out prompts for the evaluation; equal prompts are never divided between the two parts.

    Args:
        data: Dataset with the column "prompt".
        evaluation: Number of different prompts to hold out.
        seed: Seed of the choice.

    Returns:
        The rows to train on, and one row for each held-out prompt.

    Raises:
        ValueError: If no prompt would be left to train on.
    """
    codes = _numbers_of(_values(data, "prompt"), len(data))
    count = int(codes.max()) + 1
    if count <= evaluation:
        raise ValueError(f"the dataset has {count} different prompts; holding out {evaluation} leaves none to train on")
    shuffled = Dataset.from_dict({"number": np.arange(count)}).shuffle(seed=seed)
    chosen = np.array(cast("list[int]", shuffled["number"][:evaluation]), dtype=np.int64)
    first = np.unique(codes, return_index=True)[1]
    return data.select(np.flatnonzero(~np.isin(codes, chosen))), data.select(first[chosen])


def _numbers_of(prompts: Iterator[Any], count: int) -> NDArray[np.int64]:
    """Numbers of prompts, from 0 in the order in which different ones come; equal prompts have one number.

    Prompts are compared by hashes of 16 bytes, of which two of n are equal by chance with a probability below n² / 2^129.
    """
    hashes = b"".join(
        blake2b(str(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest() for prompt in prompts
    )
    keys: Any = cast("Any", pa.Array).from_buffers(pa.binary(16), count, [None, pa.py_buffer(hashes)])
    return keys.dictionary_encode().indices.to_numpy().astype(np.int64)
