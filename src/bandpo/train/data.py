"""Where prompts come from: a built-in task, or any Hugging Face dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoTokenizer
from trl.data_utils import extract_prompt

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import printable
from bandpo.toy.tasks import TASKS, make_splits
from bandpo.train.config import RunConfig
from bandpo.train.verification import unreadable

Say = Callable[[str], None]
_MAX_MODEL_CONFIG_BYTES = 1 << 24
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_task(task: str, evaluation: int) -> tuple[Dataset, Dataset]:
    """Train and held-out prompts of a built-in task."""
    train, held_out = make_splits(TASKS[task], evaluation=evaluation)
    return Dataset.from_list(train), Dataset.from_list(held_out)


def run_prompts(
    run: RunConfig, tokenizer: Any, window: int | None, *, completion: int, seed: int, say: Say
) -> tuple[Dataset, Dataset]:
    """The prompts that a run trains on, and those that it holds out; checked, so that what is wrong is said before training.

    Args:
        run: Its config.
        tokenizer: The model's.
        window: Positions that the model knows; None where it has no limit.
        completion: Tokens of the longest completion.
        seed: Of the choice of the held-out prompts.
        say: Takes messages.

    Raises:
        ValueError: If a row is bad and bad rows are not skipped, or none is left.
    """
    if run.task is not None:
        return load_task(run.task, run.eval_prompts)
    assert run.dataset is not None
    data = _checked_prompts(run, run.dataset, run.dataset_split, tokenizer, window, completion, say)
    if run.eval_dataset is None:
        return split_prompts(data, run.eval_prompts, seed)
    return data, held_out_prompts(run, tokenizer, window, completion=completion, seed=seed, say=say)


def held_out_prompts(
    run: RunConfig, tokenizer: Any, window: int | None, *, completion: int, seed: int, say: Say
) -> Dataset:
    """The prompts that `run_prompts` holds out.

    Args:
        run: As there.
        tokenizer: As there.
        window: As there.
        completion: As there.
        seed: As there.
        say: As there.
    """
    if run.eval_dataset is None:
        return run_prompts(run, tokenizer, window, completion=completion, seed=seed, say=say)[1]
    data = _checked_prompts(run, run.eval_dataset, run.eval_dataset_split, tokenizer, window, completion, say)
    return data.select(range(min(run.eval_prompts, len(data))))


def _checked_prompts(
    run: RunConfig, name: str, split: str, tokenizer: Any, window: int | None, completion: int, say: Say
) -> Dataset:
    bad: dict[str, Any] = {"skip_bad": run.bad_rows == "skip", "say": say}
    data = load_prompts(
        name, config=run.dataset_config, split=split, prompt_column=run.prompt_column, answer_column=run.answer_column,
        system_prompt=run.system_prompt, chat=tokenizer.chat_template is not None, **bad,
    )  # fmt: skip
    if run.reward == "math":
        data = with_readable_answers(data, name, **bad)
    return fit_window(data, tokenizer, window, completion, **bad)


def with_readable_answers(data: Dataset, name: str, *, skip_bad: bool, say: Say) -> Dataset:
    """The rows whose answer math-verify can read; a completion of any other would never get a score.

    Args:
        data: With the column "answer".
        name: Of the dataset, for messages.
        skip_bad: Leave the others out, and say how many.
        say: Takes messages.

    Raises:
        ValueError: If rows have answers that cannot be read; the message counts them and shows the first.
    """
    bad: list[list[int] | None] = [None]
    answers = data["answer"][:]
    if PartialState().is_main_process:
        bad = [unreadable(answers)]
    broadcast_object_list(bad)
    [rows] = bad
    assert rows is not None
    shown = ", ".join(dict.fromkeys(printable(repr(answers[i]))[:60] for i in rows[:3]))
    what = f"have an answer that math-verify cannot read as a whole ({shown}{', ...' if len(rows) > 3 else ''})"
    return _without(data, rows, f"dataset {name!r}", what, skip_bad, say)


def load_tokenizer(name: str, *, trust_remote_code: bool, local: bool = False) -> Any:
    """A model's tokenizer, padding on the left.

    Args:
        name: Hub name or folder.
        trust_remote_code: Run code that the folder brings or names.
        local: Download nothing.

    Raises:
        ValueError: If it cannot be loaded, or its folder names code and may not.
    """
    if not trust_remote_code:
        _refuse_code(Path(name))
    try:
        return AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=trust_remote_code, local_files_only=local
        )
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


def _refuse_code(folder: Path) -> None:
    """Refuse a model's folder that names code elsewhere.

    That is attention kernels of the Hub, which transformers fetches and runs, and a module for an adapter's layers, which PEFT
    imports. The same holds for the folder that an adapter names as its base.

    Args:
        folder: Of a model or an adapter; a Hub name is none.

    Raises:
        ValueError: If it does.
    """
    adapter = folder / "adapter_config.json"
    base = _json_of(adapter).get("base_model_name_or_path")
    for path in (folder / "config.json", adapter, *([Path(base) / "config.json"] if isinstance(base, str) else [])):
        found = [_json_of(path)]
        while found:
            for key, value in found.pop().items():
                kernel = "_implementation" in key and isinstance(value, str) and "/" in value
                if kernel or (key.startswith("megatron_") and value and value != "megatron.core"):
                    raise ValueError(
                        f"{path}: {key} names code that is elsewhere, {printable(repr(value))[:80]}; it is used only with "
                        "--trust-remote-code"
                    )
                if isinstance(value, dict):
                    found.append(value)


def _json_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one where there is no such file or another value in it."""
    content = parse_json(read_regular(path, _MAX_MODEL_CONFIG_BYTES), str(path)) if path.exists() else None
    return content if isinstance(content, dict) else {}


def window_of(config: Any) -> int | None:
    """How many positions a model knows, None where it has no limit.

    Args:
        config: The model's.
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
    """A Hub dataset or a local .jsonl, .json, .parquet or .csv file, with the columns "prompt" and "answer".

    Args:
        name: Hub name or file.
        config: Configuration of a Hub dataset.
        split: Split of a Hub dataset.
        prompt_column: Column with the prompt: text, or a list of messages.
        answer_column: Column with the reference answer.
        system_prompt: Put before text prompts.
        chat: Turn text prompts into messages, for models with a chat template.
        skip_bad: Leave rows without a prompt or an answer out, and say how many.
        say: Takes that message.

    Raises:
        FileNotFoundError: If `name` looks like a file and is none.
        ValueError: If the file cannot be read, a column is missing, or a row lacks a prompt or an answer; the message
            counts them.
    """
    data = _read(name, config, split)
    for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column not in data.column_names:
            raise ValueError(
                f"dataset {name!r} has no column {column!r}; set {option} to one of {', '.join(data.column_names)}"
            )
    for column in (prompt_column, answer_column):
        empty = [i for i, value in enumerate(data[column]) if _is_missing(value)]
        data = _without(data, empty, f"dataset {name!r}", f"have no {column!r}", skip_bad, say)
    odd = [i for i, value in enumerate(data[prompt_column]) if not _is_prompt(value)]
    data = _without(
        data, odd, f"dataset {name!r}", f"have a {prompt_column!r} that is neither text nor messages", skip_bad, say
    )
    for old, new in ((prompt_column, "prompt"), (answer_column, "answer")):
        if old != new:
            data = data.rename_column(old, new)

    return data.map(lambda row: {"prompt": _in_form(row["prompt"], chat, system_prompt)})


def _in_form(prompt: Any, chat: bool, system_prompt: str | None) -> Any:
    """A prompt as the model is given it: messages as they are, text with the system prompt before it."""
    if not isinstance(prompt, str):
        return prompt
    if not chat:
        return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


def fit_window(
    data: Dataset, tokenizer: Any, window: int | None, completion: int, *, skip_bad: bool = False, say: Say = print
) -> Dataset:
    """The prompts that leave room for a completion in the model's window of positions.

    Args:
        data: With the column "prompt".
        tokenizer: The model's.
        window: Positions that the model knows; None where it has no limit.
        completion: Tokens of the longest completion.
        skip_bad: Leave longer prompts out, and say how many.
        say: Takes that message.

    Raises:
        ValueError: If prompts are too long; the message counts them.
    """
    if window is None:
        return data
    if completion >= window:
        raise ValueError(
            f"max_completion_length={completion} leaves no room for a prompt in the model's window of {window}"
        )
    lengths = [_length(prompt, tokenizer) for prompt in data["prompt"]]
    long = [i for i, n in enumerate(lengths) if n + completion > window]
    what = f"are longer than {window - completion} tokens (window {window}, max_completion_length {completion})"
    return _without(data, long, "prompts", what, skip_bad, say)


def _length(prompt: Any, tokenizer: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt).input_ids)
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def _without(data: Dataset, bad: list[int], whose: str, what: str, skip: bool, say: Say) -> Dataset:
    """The rows that are not bad; an error if there are bad ones and they are not to be skipped, or no row is left."""
    if not bad:
        return data
    counted = f"{whose}: {len(bad)} rows {what}, the first is row {bad[0]}"
    if not skip:
        raise ValueError(f"{counted}; mend them, or set bad_rows: skip")
    if len(bad) == len(data):
        raise ValueError(f"{counted}; none is left")
    say(f"{counted}; they are left out, {len(data) - len(bad)} are kept")
    gone = set(bad)
    return data.select([i for i in range(len(data)) if i not in gone])


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str | list)
        for m in value
    )


def load_pairs(
    name: str, *, split: str, held_out: Dataset, tokenizer: Any, system_prompt: str | None = None, limit: int | None = None,
    skip_bad: bool = False, say: Say = print,
) -> Dataset:  # fmt: skip
    """A dataset of pairs, in TRL's preference format: "chosen" and "rejected", with "prompt" or with it inside of both.

    Pairs are brought into the form of the held-out prompts: where those are messages, text becomes messages with the same
    system prompt, so that the chat template is trained and measured. What would be cut, teaches nothing, or is measured later
    is a bad row.

    Args:
        name: Hub name or file.
        split: Split of a Hub dataset.
        held_out: Prompts that the run is evaluated on, column "prompt".
        tokenizer: The model's.
        system_prompt: The system prompt of the held-out prompts.
        limit: Tokens of the longest prompt and completion; None for no limit.
        skip_bad: Leave bad rows out, and say how many.
        say: Takes that message.

    Returns:
        Columns "prompt", "chosen", "rejected", and what else the dataset has.

    Raises:
        FileNotFoundError: If `name` looks like a file and is none.
        ValueError: If a column is missing, the pairs cannot have the form of the held-out prompts, or rows are bad and are not
            skipped; the message counts them.
    """
    data = _read(name, None, split)
    whose = f"pairs {name!r}"
    bad: dict[str, Any] = {"skip": skip_bad, "say": say}
    for column in ("chosen", "rejected"):
        if column not in data.column_names:
            raise ValueError(f"{whose} have no column {column!r}, only {', '.join(data.column_names)}")
    for column in ("prompt", "chosen", "rejected"):
        if column in data.column_names:
            empty = [i for i, value in enumerate(data[column]) if _is_missing(value)]
            data = _without(data, empty, whose, f"have no {column!r}", **bad)
    data = _pairs_in_form_of(held_out, data, whose, tokenizer, system_prompt)
    measured = {repr(prompt) for prompt in held_out["prompt"]}
    leaked = [i for i, prompt in enumerate(data["prompt"]) if repr(prompt) in measured]
    data = _without(data, leaked, whose, "have a held-out prompt, on which the run is evaluated", **bad)
    same = [i for i, (a, b) in enumerate(zip(data["chosen"], data["rejected"], strict=True)) if a == b]
    data = _without(data, same, whose, "have the same text as chosen and as rejected", **bad)
    if limit is None:
        return data
    long = [i for i, row in enumerate(data) if _longest(row, tokenizer) > limit]
    what = f"are longer than {limit} tokens (max_length, or the model's window) and would be cut"
    return _without(data, long, whose, what, **bad)


def _pairs_in_form_of(
    held_out: Dataset, data: Dataset, whose: str, tokenizer: Any, system_prompt: str | None
) -> Dataset:
    """Pairs with an explicit prompt, of text or of messages as the held-out prompts are."""
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
        data = data.map(extract_prompt)
    mixed = isinstance(data["prompt"][0], str) != texts
    if mixed:
        raise ValueError(f"{whose} mix text and messages in one row: prompt, chosen and rejected must be of one kind")
    if texts:
        data = data.map(
            lambda row: _pair_in_form(row, chat, system_prompt), remove_columns=["prompt", "chosen", "rejected"]
        )
    ours, theirs = ({_system(p) for p in rows["prompt"]} for rows in (data, held_out))
    if chat and not ours & theirs:
        raise ValueError(
            f"{whose} have the system prompt {next(iter(ours))!r}, the held-out prompts {next(iter(theirs))!r}: the run would "
            "be evaluated in another form than it is trained in; put the same one into both"
        )
    return data


def _pair_in_form(row: dict[str, Any], chat: bool, system_prompt: str | None) -> dict[str, Any]:
    answers = {side: row[side] for side in ("chosen", "rejected")}
    if chat:
        answers = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": _in_form(row["prompt"], chat, system_prompt), **answers}


def _system(prompt: Any) -> str | None:
    """The system prompt of messages, None where there is none."""
    if isinstance(prompt, str) or not prompt or prompt[0]["role"] != "system":
        return None
    return str(prompt[0]["content"])


def _longest(row: dict[str, Any], tokenizer: Any) -> int:
    """Tokens of the prompt and the longer completion, as TRL makes them."""
    if isinstance(row["prompt"], str):
        return max(len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")) + 1
    return max(
        len(tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=True, return_dict=True)["input_ids"])
        for side in ("chosen", "rejected")
    )


def is_file(name: str) -> bool:
    """Whether a dataset of this name is a file that can be read, so that nothing is fetched for it.

    Args:
        name: Of a dataset.
    """
    return Path(name).suffix in _READERS and Path(name).is_file()


def _read(name: str, config: str | None, split: str) -> Dataset:
    suffix = Path(name).suffix
    try:
        if suffix not in _READERS:
            return datasets.load_dataset(name, config, split=split)
        if not Path(name).is_file():
            raise FileNotFoundError(f"dataset {name!r}: no such file")
        data = datasets.load_dataset(_READERS[suffix], data_files=name, split="train")
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, UnicodeDecodeError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"dataset {name!r} cannot be read as {suffix.lstrip('.')}: {reason}") from error
    if not len(data):
        raise ValueError(f"dataset {name!r} has no rows")
    return data


def split_prompts(data: Dataset, evaluation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out prompts for evaluation; equal prompts stay on one side.

    Raises:
        ValueError: If fewer prompts than that would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(data["prompt"]):
        groups.setdefault(str(prompt), []).append(i)
    if len(groups) <= evaluation:
        raise ValueError(
            f"the dataset has {len(groups)} different prompts; holding out {evaluation} leaves none to train on"
        )
    order = Dataset.from_dict({"prompt": list(groups)}).shuffle(seed=seed)["prompt"]
    held_out = [groups[p][0] for p in order[:evaluation]]
    train = [i for p in order[evaluation:] for i in groups[p]]
    return data.select(sorted(train)), data.select(held_out)
