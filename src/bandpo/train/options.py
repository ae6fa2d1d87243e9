"""The options of `bandpo train` as a table: help and the check of names need neither TRL nor torch.

`tools/options.py` makes the table in the package from the dataclasses. A table belongs to versions of TRL, transformers and
torch, and to the declarations in bandpo's own sources. Where one of these differs from what is installed, a table is made from
the dataclasses at hand, which takes some seconds, and is kept in the user's cache: no option is shown that is not there.
"""

import argparse
import ast
import contextlib
import inspect
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from bandpo._system.files import read_checked_json, write_checked_json
from bandpo._system.options import ExampleFormatter, add_examples
from bandpo._system.secrets import redact_text
from bandpo.train.config import METHODS, PRESETS, USAGE, Declared, declared_by_trl, run_keys
from bandpo.train.schema import schema_text

Row = dict[str, Any]
"""One option: what argparse is given for it, its group, and the name of its type."""
Table = dict[str, Any]
"""`versions` and `declarations` that the table belongs to, the names of the `objectives`, and the rows of each parser: `grpo`,
`preference`."""

PACKAGED = Path(__file__).with_name("options.json")
"""The table in the package."""
PACKAGES = ("trl", "transformers", "torch")
"""The packages whose versions decide about TRL's options and their defaults."""
MOST_USED = (
    "output_dir",
    "resume_from_checkpoint",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "use_vllm",
    "report_to",
    "seed",
)
"""The options of TRL that `--help` shows; `--help-all` shows all."""

_SOURCES = Path(__file__).parents[1]
_SECTIONS = {
    "the run": ("method", "dry_run", "threads"),
    "model": ("model", "lora_rank", "lora_alpha", "warm_up_steps"),
    "data": (
        *("task", "shots", "dataset", "dataset_config", "dataset_split", "prompt_column", "answer_column"),
        *("system_prompt", "pairs", "bad_rows"),
    ),
    "reward": ("reward", "reward_timeout", "reward_workers", "reward_errors"),
    "evaluation before and after": (
        *("eval_dataset", "eval_dataset_split", "eval_prompts", "eval_samples"),
        "eval_temperature",
    ),
}
"""The sections of the help for the options of `RunConfig`."""
_METHOD = "objective and training"
_EXAMPLES = (
    "train                                    # the main job, on the CPU",
    "train --config run.yaml --radius 0.1     # the command line wins",
    "train --dry_run --config run.yaml        # check, print what it needs, and stop",
    "train --config RUN/config.yaml --output_dir RUN --resume_from_checkpoint latest",
    "train --schema > bandpo.schema.json      # for editors: the keys of run.yaml",
)
_DESCRIPTION = (
    "Without --config, --preset, --model and --dataset: the main job, a small model on the CPU. Every option is also a key of "
    "the YAML file, and the command line wins."
)
_PARTS = ("nargs", "const", "default", "choices", "help", "required")


def load_table() -> Table:
    """The table for what is installed: that of the package, that of the cache, or a new one, which is kept in the cache.

    Where TRL is not installed, it is that of the package.
    """
    versions = installed_versions()
    found = _read(PACKAGED, versions)
    if found is not None:
        return found
    kept = _kept(versions)
    found = None if kept is None else _read(kept, versions)
    if found is not None:
        return found
    if "trl" not in versions:  # nothing trains here; help and the check of names work all the same
        return packaged_table()
    table = make_table()
    if kept is not None:
        with contextlib.suppress(OSError):  # without a cache, the next call makes it again
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_checked_json(kept, table)
    return table


def packaged_table() -> Table:
    """The table in the package, which belongs to the newest TRL; reading it takes some milliseconds."""
    return read_checked_json(PACKAGED)


def make_table() -> Table:
    """The table of the installed versions, from the parsers that TRL makes of the dataclasses. Imports TRL."""
    from bandpo import OBJECTIVES  # torch
    from bandpo.preference import PREFERENCES

    rows: dict[str, list[Row]] = {}
    modules: set[str] = set()
    for method in ("grpo", "dpo"):
        declared = declared_by_trl(method)
        own: dict[str, str] = {}
        kinds: dict[str, list[str]] = {}
        for cls in cast("list[type]", cast("Any", declared.parser).dataclass_types):
            kinds |= {name: kinds_of(hint) for name, hint in get_type_hints(cls).items()}
            for base in (c for c in cls.__mro__ if c.__module__.startswith("bandpo.")):
                modules.add(base.__module__)
                own |= {name: "run" if name in run_keys() else "method" for name in inspect.get_annotations(base)}
        actions = (a for a in declared.parser._actions if a.dest != "help")
        rows[_parser_of(method)] = [
            _row(a, own.get(a.dest, "trl"), kinds[a.dest], is_float=a.dest in declared.floats) for a in actions
        ]
    declaring = {m.removeprefix("bandpo.").replace(".", "/") + ".py" for m in modules}
    return {
        "versions": installed_versions(),
        "declarations": {file: n for file in sorted(declaring) if (n := declarations(_SOURCES / file))},
        "objectives": {"grpo": list(OBJECTIVES), "preference": list(PREFERENCES)},
        **rows,
    }


def declared_in(table: Table, method: str) -> Declared:
    """The options of a method, as the table has them.

    Args:
        table: The table.
        method: A key of `METHODS`.
    """
    rows: list[Row] = table[_parser_of(method)]
    parser = _Parser(prog="bandpo train", usage=USAGE, allow_abbrev=False, add_help=False, exit_on_error=False)
    add_helps(parser, {
        "--help": partial(help_text, rows, method, every=False),
        "--help-all": partial(help_text, rows, method, every=True),
        "--schema": partial(schema_text, table),
    })  # fmt: skip
    for row in rows:
        _add(parser, row, row["options"])
    return Declared(parser, frozenset(row["name"] for row in rows if row.get("float")))


def help_text(rows: list[Row], method: str, *, every: bool) -> str:
    """What `--help` and `--help-all` show.

    Args:
        rows: The rows of the table for the method.
        method: A key of `METHODS`.
        every: Whether to show all options of TRL and both spellings of each option.
    """
    config = "GRPOConfig" if method == "grpo" else "DPOConfig"
    count = sum(row["group"] == "trl" for row in rows)
    other = "--method dpo --help shows those of preference learning" if method == "grpo" else f"these are for {method}"
    parser = argparse.ArgumentParser(
        prog="bandpo train",
        usage=USAGE,
        description=_DESCRIPTION,
        formatter_class=_Formatter,
        add_help=False,
        epilog="A dash may take the place of an underscore. Options differ by --method: "
        f"{other}." + ("" if every else f" --help-all shows all {count} options of TRL's {config}, too."),
    )
    add_examples(parser, *_EXAMPLES)
    add_helps(parser, None)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with options")
    parser.add_argument("--preset", metavar="NAME", help=f"a job of bandpo instead of a file: {', '.join(PRESETS)}")
    for title, own in _sections(rows).items():
        _add_group(parser, title, own, every=every)
    if every:
        _add_group(parser, f"options of TRL's {config}", (row for row in rows if row["group"] == "trl"), every=every)
    else:
        used = [row for name in MOST_USED for row in rows if row["name"] == name and row["group"] == "trl"]
        _add_group(parser, f"the most used options of TRL's {config}", used, every=every)
    return parser.format_help()


def _sections(rows: list[Row]) -> dict[str, list[Row]]:
    """The options of bandpo in the sections of the help; an option that no section names is in the first of its group."""
    named = {name: title for title, names in _SECTIONS.items() for name in names}
    found: dict[str, list[Row]] = {title: [] for title in (*_SECTIONS, _METHOD)}
    for row in rows:
        if row["group"] != "trl":
            found[_METHOD if row["group"] == "method" else named.get(row["name"], next(iter(_SECTIONS)))].append(row)
    found[_METHOD].sort(key=lambda row: row["name"] != "objective")
    return found


def add_helps(parser: argparse.ArgumentParser, texts: Mapping[str, Callable[[], str]] | None) -> None:
    """Declare the options that print a text and end the command.

    Args:
        parser: The parser.
        texts: Makes the text of each of the options; None declares them for a list only.
    """
    for options, what in (
        (("-h", "--help"), "show bandpo's options and the most used ones of TRL, and stop"),
        (("--help-all",), "show all options, and stop"),
        (("--schema",), "print the JSON schema of the YAML file, for editors, and stop"),
    ):
        text = None if texts is None else texts[options[-1]]
        parser.add_argument(*options, action=_ShowText, text=text, help=what)


def installed_versions() -> dict[str, str]:
    """The versions of the packages that options come from; without local parts such as `+cpu`."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).partition("+")[0]
    return found


def declarations(path: Path) -> int:
    """The CRC-32 of the fields that the classes of a source file declare; other code may change, 0 for no field.

    Args:
        path: The source file.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    fields = [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for cls in ast.parse(text).body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
    ]
    return zlib.crc32("\n".join(fields).encode())


def as_text(table: Table) -> str:
    """The table as JSON with one option on each line.

    Args:
        table: The table.
    """
    parts: list[str] = []
    for name, value in table.items():
        if isinstance(value, list):
            inner = ",\n".join(json.dumps(row, ensure_ascii=False) for row in cast("list[Row]", value))
            parts.append(f"{json.dumps(name)}: [\n{inner}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def parsed(declared: Declared, arguments: list[str]) -> dict[str, Any] | None:
    """The values of a command line; None where TRL's parser has to decide about one.

    Args:
        declared: Options from a table.
        arguments: Command line after `bandpo train`, without `--config`.

    Raises:
        ValueError: If a text or a number is missing or wrong: the message is that of argparse, as TRL's parser has it.
    """
    parser = declared.parser
    try:
        return vars(parser.parse_args(arguments))
    except _UndecidedError:
        return None
    except argparse.ArgumentError as error:
        refused = next(a for a in parser._actions if "/".join(a.option_strings) == error.argument_name)
        if refused.type in _TYPES.values() and refused.type is not _truth:
            raise ValueError(redact_text(str(error))) from None
        return None


class _UndecidedError(Exception):
    """A mistake whose message is TRL's parser's to write."""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves a mistake which is not that of one option to TRL's."""

    def error(self, message: str) -> NoReturn:
        raise _UndecidedError(message)


class _Formatter(ExampleFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows examples and defaults, without those that are None: the help text says what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _ShowText(argparse.Action):
    """Prints a text, and ends the command."""

    def __init__(
        self,
        option_strings: list[str],
        dest: str,  # noqa: ARG002 (argparse's signature)
        *,
        text: Callable[[], str] | None,
        help: str,
    ) -> None:
        super().__init__(option_strings, "help", nargs=0, default=argparse.SUPPRESS, help=help)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        assert self.text is not None
        print(self.text(), end="")
        parser.exit()


def _parser_of(method: str) -> str:
    return "grpo" if not METHODS[method] else "preference"


def _kept(versions: Mapping[str, str]) -> Path | None:
    """The file of the cache for these versions; None where nothing says which folder that is."""
    try:
        from bandpo._system.cache import cache_root
    except ImportError:  # platformdirs, which TRL does not need
        return None
    return cache_root() / f"train-options-{'-'.join(versions.values())}.json"


def _read(path: Path, versions: Mapping[str, str]) -> Table | None:
    """The table in a file, None if it does not belong to these versions and to the sources of this package."""
    try:
        table = read_checked_json(path)
        declared: Mapping[str, int] = table.get("declarations", {})
        same = all(declarations(_SOURCES / file) == expected for file, expected in declared.items())
    except (OSError, ValueError):  # there is none, or it is damaged
        return None
    whole = "objectives" in table  # a table in the cache may be of an older bandpo
    return table if same and whole and table.get("versions") == versions else None


def kinds_of(hint: Any) -> list[str]:
    """The kinds of JSON values that a type of Python allows; empty for a type that is none of them.

    Args:
        hint: A type, as `typing.get_type_hints` gives it.

    Examples:
        >>> kinds_of(float | None), kinds_of(dict[str, int] | str), kinds_of(object)
        (['number', 'null'], ['object', 'string'], [])
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        found = [kinds_of(part) for part in get_args(hint)]
        return list(dict.fromkeys(kind for part in found for kind in part)) if all(found) else []
    if origin is Literal:
        return list(dict.fromkeys(kind for value in get_args(hint) for kind in kinds_of(type(value))))
    cls = origin or hint
    return [kind for kind, types in _KINDS if isinstance(cls, type) and issubclass(cls, types)][:1]


_KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("null", (type(None),)),
    ("boolean", (bool,)),  # which is a kind of int for Python
    ("integer", (int,)),
    ("number", (float,)),
    ("string", (str, Enum)),
    ("array", (list, tuple)),
    ("object", (dict,)),
)
"""The kinds of JSON values with the types of Python that hold them; the first one counts."""


def _row(action: argparse.Action, group: str, kinds: list[str], *, is_float: bool) -> Row:
    """What argparse needs to make the action again, in values of JSON, without those that are not set."""
    kind = getattr(action.type, "__name__", "")
    named = action.type in (str, int, float) or kind == "string_to_bool"
    optional = not named and kind in ("int", "float")  # TRL's parser takes the word none for these
    parts = {part: getattr(action, part) for part in _PARTS}
    parts["choices"] = None if action.choices is None else [str(c) for c in action.choices]
    row = {
        "name": action.dest,
        "options": list(action.option_strings),
        "group": group,
        "type": f"{kind}|none" if optional else kind.replace("string_to_", "") if named else None,
        "float": is_float or None,
        "kinds": kinds or None,
        **{k: v for k, v in parts.items() if v is not False or k != "required"},
    }
    return {k: v for k, v in row.items() if v is not None}


def _add(parser: Any, row: Row, options: Iterable[str]) -> None:
    """Declare the option of a row."""
    given = {part: row[part] for part in _PARTS if part in row}
    if given.get("nargs") == 0:
        for part in ("nargs", "const"):
            given.pop(part)
        parser.add_argument(*options, dest=row["name"], action="store_false", **given)
    else:
        parser.add_argument(*options, dest=row["name"], type=_TYPES.get(row.get("type", "")), **given)


def _add_group(parser: argparse.ArgumentParser, title: str, rows: Iterable[Row], *, every: bool) -> None:
    group = parser.add_argument_group(title)
    for row in rows:
        _add(group, row, row["options"] if every else row["options"][:1])


def _or_none(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(text)


_TYPES: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": _truth,
    "int|none": _or_none(int),
    "float|none": _or_none(float),
}
"""The types that a table names; a value of another type stays text, and TRL's parser reads it."""
