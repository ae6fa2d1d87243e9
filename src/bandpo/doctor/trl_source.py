"""Reads the configuration in a Python script or notebook that trains with TRL's `GRPOTrainer`, by parsing alone.

The keyword arguments of `GRPOConfig(...)` and `BandGRPOConfig(...)` are read where they are literals, or names of literals
(`bandpo.doctor.python_source`). What else sets an option is listed with its line, and no rule uses that option.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from bandpo._system.bounded import parse_json, read_regular
from bandpo.doctor.python_source import MAX_SOURCE_BYTES, UNKNOWN, Call, Given, Scope, Source
from bandpo.doctor.setup import Setup, short
from bandpo.doctor.trl_launch import read_launch, with_overrides

MAX_NOTEBOOK_BYTES = 1 << 24
_MAX_VALUES, _MAX_CELLS = 1_000_000, 2000
_MAX_CALLS = 50  # configurations, trainers, and loaded models of one file
_CONFIGS = ("GRPOConfig", "BandGRPOConfig")
_TRAINERS = ("GRPOTrainer", "BandGRPOTrainer")
# Configurations of TRL's other trainers that learn from a policy's own completions.
_OTHERS = {
    "RLOOConfig": "TRL's RLOOTrainer",
    "OnlineDPOConfig": "TRL's OnlineDPOTrainer",
    "AsyncGRPOConfig": "TRL's AsyncGRPOTrainer",
    "NashMDConfig": "TRL's NashMDTrainer",
    "XPOConfig": "TRL's XPOTrainer",
    "PPOConfig": "TRL's PPOTrainer",
    "DistillationConfig": "TRL's DistillationTrainer",
    "DPOConfig": "TRL's DPOTrainer",
    "KTOConfig": "TRL's KTOTrainer",
    "SFTConfig": "TRL's SFTTrainer",
    "RewardConfig": "TRL's RewardTrainer",
}
_PARSERS = ("TrlParser", "HfArgumentParser", "H4ArgumentParser")
_SAME = ("dataclasses.replace", "copy.replace", "copy.copy", "copy.deepcopy")
_MAX_STEPS = 5000  # expressions that are followed to the configurations that they give
# Attributes of GRPOTrainer that its loss uses, and the option that each is from.
_OF_TRAINER = {
    "epsilon_low": "epsilon",
    **{
        name: name
        for name in (
            "beta",
            "epsilon_high",
            "importance_sampling_level",
            "loss_type",
            "min_p",
            "num_iterations",
            "scale_rewards",
            "temperature",
            "top_k",
            "top_p",
        )
    },
}
_LOSSES = ("_compute_loss", "compute_loss")
_MAGIC = re.compile(r"(\s*)(?:[%!]|\?)")
_ASSIGNED_MAGIC = re.compile(r"(\s*[A-Za-z_][\w.]*\s*=\s*)[%!]")
_ASKED = re.compile(r"(\s*)[\w.]+\?{1,2}\s*")
_PYTHON_CELLS = ("capture", "time", "timeit", "prun")
_SHELL_CELLS = ("bash", "sh", "script")
_RUN = "exec('')"  # what %run does: it may bind any name


@dataclass
class Notebook:
    """The cells of a notebook.

    Args:
        cells: Name and Python source of each cell.
        shell: What the cells give to a shell.
        unread: Lines about what is not read.
    """

    cells: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    shell: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])


def read_notebook(path: Path) -> Notebook:
    """The cells of a Jupyter notebook.

    Lines for IPython (`%...`, `!...`, `...?`) are taken out of a cell that is not Python with them.

    Args:
        path: The .ipynb file.

    Raises:
        ValueError: If it is not a notebook of Python, or is too large.
    """
    data = read_regular(path, MAX_NOTEBOOK_BYTES, follow=False)
    if data.count(b",") + data.count(b"[") + data.count(b"{") > _MAX_VALUES:
        raise ValueError(f"{path} has more than {_MAX_VALUES:,} values; clear its outputs")
    tree = parse_json(data, str(path))
    cells = cast("dict[str, Any]", tree).get("cells") if isinstance(tree, dict) else None
    if not isinstance(cells, list):
        raise ValueError(f"{path} is not a Jupyter notebook: it has no list of cells")
    if _language(cast("dict[str, Any]", tree)) not in ("", "python"):
        raise ValueError(
            f"{path}: a notebook of {short(_language(cast('dict[str, Any]', tree)))}; the doctor reads Python"
        )
    found = Notebook()
    every = [cast("dict[str, Any]", cell) for cell in cast("list[Any]", cells) if isinstance(cell, dict)]
    codes = [cell for cell in every if cell.get("cell_type") == "code"]
    if len(codes) > _MAX_CELLS:
        raise ValueError(f"{path} has more than {_MAX_CELLS:,} cells of code")
    for number, cell in enumerate(codes, 1):
        lines: object = cell.get("source")
        text = "".join(str(x) for x in cast("list[object]", lines)) if isinstance(lines, list) else lines
        if isinstance(text, str):
            _add_cell(found, f"code cell {number}", text.replace("\x00", "\ufffd"))
    return found


def _language(tree: Mapping[str, Any]) -> str:
    place: Any = tree
    for name in ("metadata", "kernelspec", "language"):
        place = cast("dict[str, Any]", place).get(name) if isinstance(place, dict) else None
    return place.lower() if isinstance(place, str) else ""


def _add_cell(found: Notebook, name: str, text: str) -> None:
    """Add the Python of a cell, and what it gives to a shell."""
    head, _, rest = text.lstrip().partition("\n")
    if head.startswith("%%"):
        magic, _, argument = head[2:].strip().partition(" ")
        if magic in _SHELL_CELLS:
            found.shell.append(rest)
        elif magic in ("writefile", "file"):
            found.unread.append(f"{name} writes {short(argument.strip())}, which is not read")
        if magic not in _PYTHON_CELLS:
            return
        text = "\n" + rest
    try:
        ast.parse(text) if len(text) <= MAX_SOURCE_BYTES else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines: list[str] = []
        within = False  # the line before, which is no Python, ends with a backslash
        for line in text.split("\n"):
            plain = "" if within else _plain_line(line, found)
            lines.append(plain)
            within = line.rstrip().endswith("\\") and (within or plain != line)
        text = "\n".join(lines)
    found.cells.append((name, text))


def _plain_line(line: str, found: Notebook) -> str:
    """A line of a cell without IPython's additions to Python."""
    if match := _MAGIC.match(line):
        rest = line[match.end() :].strip()
        if line.lstrip().startswith("!"):
            found.shell.append(rest)
        return match[1] + (_RUN if rest.startswith(("run ", "load ", "store ")) else "pass")
    if match := _ASSIGNED_MAGIC.match(line):
        return f"{match[1]}ipython()"
    return f"{match[1]}pass" if (match := _ASKED.fullmatch(line)) else line


def read_source(
    path: Path, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> Setup:
    """The settings in a Python script or notebook that creates TRL's `GRPOConfig`.

    Args:
        path: A .py or .ipynb file.
        overrides: Settings `key=value`, which replace those of the file.
        processes: Number of processes that will train.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it has no such configuration, or cannot be read.
    """
    notes: list[str] = []
    if path.suffix == ".ipynb":
        book = read_notebook(path)
        notes += book.unread
        parts, shell = book.cells, "\n".join(book.shell)
    else:
        text = read_regular(path, MAX_SOURCE_BYTES, follow=False).decode("utf-8-sig", errors="replace")
        parts, shell = [("", text)], ""
    try:
        source = Source(parts, (lambda cell, why: notes.append(f"{cell}: {why}")) if path.suffix == ".ipynb" else None)
        return _Script(source, notes).setup(overrides, processes, vocabulary)
    except ValueError as error:
        if shell and isinstance(error, _NoConfigError):
            found = read_launch(shell, overrides, processes=processes, vocabulary=vocabulary)
            if found is not None:
                return found
        raise ValueError(f"{path}: {error}") from None


class _NoConfigError(ValueError):
    """There is no configuration of GRPO in the source."""


class _Script:
    """What a script or notebook says about its run.

    Args:
        source: The parsed source.
        notes: Lines about what is not read.
    """

    def __init__(self, source: Source, notes: list[str]) -> None:
        self.source = source
        self.notes = notes
        self.bypassed = ""
        self._kinds: dict[tuple[str, tuple[str, ...]], str] = {}
        self._looked_at: set[int] = set()
        self._steps = 0
        self._through: dict[int, str] = {}  # calls of other functions that give a configuration on, by its node
        self.configs = [call for call in source.calls if self._kind(call.name, _CONFIGS)]
        self.trainers = [call for call in source.calls if self._kind(call.name, _TRAINERS)]
        if len(self.configs) > _MAX_CALLS or len(self.trainers) > _MAX_CALLS:
            raise ValueError(f"it creates more than {_MAX_CALLS} configurations or trainers")

    def setup(self, overrides: Sequence[str], processes: int, vocabulary: int | None) -> Setup:
        """The settings of the configuration that the trainer gets.

        Args:
            overrides: Settings `key=value`, which replace those of the source.
            processes: Number of processes that will train.
            vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        """
        from bandpo.doctor.trl import read_trl

        found = self._configurations()
        given = found[0] if len(found) == 1 else self._merged(found)
        ours = any(self._kind(call.name, ("BandGRPOConfig",)) for call in self.configs)
        if ours and "objective" not in given.values and "objective" not in given.unread:
            given.values["objective"] = _default_objective()
        self._from_trainers(given)
        unsloth = self._unsloth(given)
        for key, value in with_overrides({}, overrides).items():
            given.set(key, value)
        setup = read_trl(
            given.values,
            processes=processes,
            vocabulary=vocabulary,
            unknown=given.unread,
            opened=given.opened,
            notes=self.notes,
            unsloth=unsloth,
        )
        return replace(setup, bypassed=setup.bypassed or self.bypassed)

    # ---- which configuration ----

    def _kind(self, name: str, wanted: tuple[str, ...], depth: int = 0) -> str:
        """The class of `wanted` that a name is, or that a class of this file derives from; "" for none."""
        key = (name, wanted)
        if key not in self._kinds:
            self._kinds[key] = ""  # also where a class derives from itself
            self._kinds[key] = self._kind_of(name, wanted, depth)
        return self._kinds[key]

    def _kind_of(self, name: str, wanted: tuple[str, ...], depth: int) -> str:
        last = name.rpartition(".")[2]
        if last.startswith("Unsloth") and last.removeprefix("Unsloth") in wanted:
            return last.removeprefix("Unsloth")
        own = self.source.classes.get(name, []) if "." not in name else []
        if own and depth < 10:
            bases = [self.source.dotted(base) for base in own[-1][0].bases]
            return next((kind for base in bases if base != name and (kind := self._kind(base, wanted, depth + 1))), "")
        return last if last in wanted else ""

    def _configurations(self) -> list[Given]:
        used: list[Given] = []
        seen: set[int] = set()
        for trainer in self.trainers:
            for call in self._of_trainer(trainer):
                if id(call.node) not in seen:
                    seen.add(id(call.node))
                    used.append(self._config(call, trainer))
            if not self._argument(trainer, "args") and not any(k.arg is None for k in trainer.node.keywords):
                used.append(Given())  # TRL creates a configuration of defaults
        chosen = [call for call in self.source.calls if id(call.node) in seen]
        if not used:
            chosen = self.configs
            used = [self._config(call, None) for call in chosen]
        if not used:
            raise self._nothing()
        self.configs = chosen
        if len(used) > 1:
            lines = ", ".join(self.source.line(call.node) for call in chosen[:8])
            self.notes.append(f"{len(used)} configurations of GRPO are in the file ({lines})")
        return used

    def _of_trainer(self, trainer: Call) -> list[Call]:
        """The configurations that a trainer may get."""
        node = self._argument(trainer, "args")
        return [] if node is None else self._made(node, trainer.scope, trainer.time)

    def _made(self, node: ast.AST, scope: Scope, time: int, depth: int = 0) -> list[Call]:
        """The calls that create what an expression gives."""
        self._steps += 1
        if self._steps > _MAX_STEPS or depth > 10:
            return []
        if isinstance(node, ast.Call):
            own = [call for call in self.configs if call.node is node]
            return own or self._given_on(node, scope, time, depth + 1)
        if not isinstance(node, ast.Name):
            return []
        bindings, home = self.source.bound(node.id, scope, time)
        return [
            call
            for b in bindings[:20]
            if home is not None and isinstance(b.value, ast.expr)
            for call in self._made(b.value, home, b.time, depth + 1)
        ]

    def _given_on(self, node: ast.Call, scope: Scope, time: int, depth: int) -> list[Call]:
        """The configurations among the arguments of a call, which may give one of them back, changed."""
        if self.source.dotted(node.func) in _SAME:
            return self._made(node.args[0], scope, time, depth) if node.args else []
        arguments = [*node.args, *(k.value for k in node.keywords if k.arg)]
        found = [call for a in arguments[:20] for call in self._made(a, scope, time, depth)]
        for call in found:
            self._through.setdefault(id(call.node), self.source.text(node))
        return found

    def _argument(self, call: Call, name: str) -> ast.expr | None:
        """An argument of the trainer, by name or at its place: model, reward_funcs, args."""
        place = {"model": 0, "args": 2}.get(name, len(call.node.args))
        placed = call.node.args[place] if place < len(call.node.args) else None
        return next((k.value for k in call.node.keywords if k.arg == name), placed)

    def _nothing(self) -> ValueError:
        """The error for a file without a configuration of GRPO."""
        for call in self.source.calls:
            if call.name.rpartition(".")[2] in _PARSERS:
                return _NoConfigError(
                    "the configuration of this script is in a YAML file or on its command line; examine that file, or a "
                    "shell script with the command"
                )
        others = [other for call in self.source.calls if (other := self._kind(call.name, tuple(_OTHERS)))]
        looks = f"this looks like {_OTHERS[others[0]]}; " if others else "there is no call of GRPOConfig in it; "
        return _NoConfigError(f"{looks}the doctor reads GRPOConfig(...) and BandGRPOConfig(...) in Python")

    # ---- what it sets ----

    def _config(self, call: Call, trainer: Call | None) -> Given:
        """The options of one configuration, with what is changed after it was created."""
        found = self._of_class(call.name if call.name in self.source.classes else call.name.rpartition(".")[2])
        found.add(self.source.given(call))
        if len(call.node.args) > 1 or any(isinstance(a, ast.Starred) for a in call.node.args):
            found.add(Given(opened=[self.source.text(call.node)]))
        module = call.name.rpartition(".")[0]
        if (
            module
            and module.partition(".")[0] not in ("trl", "bandpo", "unsloth")
            and call.name not in self.source.classes
        ):
            self.notes.append(
                f"{call.name[:120]} ({self.source.line(call.node)}) is taken to have the options and defaults of TRL's"
            )
        for scope, name, since in self._names(call):
            until = (trainer.scope, trainer.time) if trainer else (scope, 1 << 60)
            later = Given()
            self.source.apply(later, name, scope, since, until)
            self._counted_late(later)
            found.add(later)
            self._passed_on(found, name, scope)
        self._set_elsewhere(found, call)
        replaced = [c for c in self.source.calls if c.name in ("dataclasses.replace", "copy.replace")]
        for other in replaced[:_MAX_CALLS]:  # dataclasses.replace(args, beta=0.1)
            if call in self._made(other.node, other.scope, other.time):
                found.add(self.source.given(other))
        return found

    def _set_elsewhere(self, found: Given, call: Call) -> None:
        """What is set through an attribute, a copy, another function or the trainer is not known."""
        if self._steps > _MAX_STEPS:
            found.add(Given(opened=["what the file does with its configurations"]))
        if id(call.node) in self._through:
            found.add(Given(opened=[self._through[id(call.node)]]))
        owners = {name for _, name, _ in self._names(call)} | self._attributes(call)
        for key, (owner, node) in self.source.deep.items():
            option = key if "args" in owner or owner in owners else _OF_TRAINER.get(key) if "trainer" in owner else None
            if option:
                found.set(option, UNKNOWN, f"what {owner}.{key} is set to ({self.source.line(node)})")
        for scope, name, since in [*self._copies(call), *(x for t in self.trainers for x in self._names(t))]:
            is_trainer = not any(name == copied and scope is place for place, copied, _ in self._copies(call))
            for change in self.source.changes(name, scope, since)[:_MAX_CALLS]:
                key = _OF_TRAINER.get(change.key or "") if is_trainer else change.key
                if key:
                    found.set(key, UNKNOWN, f"what {name}.{change.key} is set to ({self.source.line(change.line)})")

    def _attributes(self, call: Call) -> set[str]:
        """The attributes that a configuration is stored in, as `self.cfg = GRPOConfig(...)`."""
        changes = [c for scope in _around(call.scope) for several in scope.changes.values() for c in several]
        return {change.key for change in changes if change.value is call.node and change.key}

    def _copies(self, call: Call) -> list[tuple[Scope, str, int]]:
        """The names that copies of a configuration get, with their scope and where they get it."""
        return [
            (scope, name, binding.time)
            for scope in _around(call.scope)
            for name, bindings in scope.bindings.items()
            for binding in bindings
            if isinstance(binding.value, ast.Call)
            and self.source.dotted(binding.value.func) in _SAME
            and call in self._made(binding.value, scope, binding.time)
        ][:_MAX_CALLS]

    def _of_class(self, name: str, depth: int = 0) -> Given:
        """The defaults of a configuration that is a class of this file: those of its fields, and of what it derives from."""
        found = Given()
        for node, scope in self.source.classes.get(name, [])[-1:]:
            for base in reversed(node.bases if depth < 10 else []):
                if (inner := self.source.dotted(base)) != name and self._kind(inner, _CONFIGS):
                    found.add(self._of_class(inner, depth + 1))
            is_data = any(self._decorator(d).rpartition(".")[2] == "dataclass" for d in node.decorator_list)
            annotated = {ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)}
            for key, bindings in scope.bindings.items():
                value = bindings[-1].value
                if not isinstance(value, ast.expr):
                    continue
                if is_data and key in annotated:
                    found.set(
                        key, self.source.values(value, scope, bindings[-1].time), partial(self.source.text, value)
                    )
                elif not key.startswith("_"):
                    self.notes.append(
                        f"{node.name[:80]}.{key[:80]} ({self.source.line(value)}) sets nothing: without "
                        f"{'an annotation' if is_data else '@dataclass'} it is no field"
                    )
            if "__post_init__" in scope.bindings or "__init__" in scope.bindings:
                found.add(Given(opened=[f"{node.name[:80]}.__post_init__ ({self.source.line(node)})"]))
        return found

    def _decorator(self, node: ast.expr) -> str:
        return self.source.dotted(node.func if isinstance(node, ast.Call) else node)

    def _names(self, call: Call) -> list[tuple[Scope, str, int]]:
        """The names that a configuration gets, with their scope and where they get it."""
        return [
            (scope, name, binding.time)
            for scope in _around(call.scope)
            for name, bindings in scope.bindings.items()
            for binding in bindings
            if binding.value is call.node
        ][:_MAX_CALLS]

    def _counted_late(self, later: Given) -> None:
        """TRL computes the steps for each rollout when it creates a configuration: a later change does not reach them."""
        from bandpo.doctor.trl import COUNTED

        for key in COUNTED & later.values.keys():
            later.set(key, UNKNOWN, f"{later.values[key]!r}, set after the configuration was created")

    def _passed_on(self, found: Given, name: str, home: Scope) -> None:
        """Options that functions of this file may set, to which a configuration is given."""
        for call in self.source.calls:
            given = [*call.node.args, *(k.value for k in call.node.keywords)]
            if not any(isinstance(a, ast.Name) and a.id == name for a in given):
                continue
            bindings, place = self.source.bound(name, call.scope, call.time)
            if place is not home or not bindings or not isinstance(call.node.func, ast.Name):
                continue
            functions, _ = self.source.bound(call.node.func.id, call.scope, call.time)
            for function in functions:
                body = function.value
                if isinstance(body, ast.FunctionDef | ast.AsyncFunctionDef) and id(body) not in self._looked_at:
                    self._looked_at.add(id(body))
                    self._stored_in(found, body)

    def _stored_in(self, found: Given, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.set(node.attr, UNKNOWN, f"what {function.name[:80]} sets ({self.source.line(node)})")
            elif isinstance(node, ast.Call) and self.source.dotted(node.func) == "setattr":
                found.add(Given(opened=[self.source.text(node)]))

    def _merged(self, found: Sequence[Given]) -> Given:
        """What several configurations have in common."""
        merged = Given(dict(found[0].values), dict(found[0].unread), [x for given in found for x in given.opened])
        for key in {key for given in found for key in (*given.values, *given.unread)}:
            values = [given.values.get(key, UNKNOWN) for given in found]
            if any(value is UNKNOWN or type(value) is not type(values[0]) or value != values[0] for value in values):
                merged.set(key, UNKNOWN, "(the configurations differ)")
        return merged

    # ---- the trainer, the model and unsloth ----

    def _from_trainers(self, given: Given) -> None:
        """What the arguments of the trainer add: the model, adapters, and a loss of the file's own."""
        for trainer in self.trainers[-1:]:
            if self._argument(trainer, "peft_config") is not None:
                given.values["use_peft"] = True
            self._model(given, self._argument(trainer, "model"), trainer)
            for node, _ in self.source.classes.get(trainer.name, [])[-1:]:
                own = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name in _LOSSES]
                if own:
                    place = f"{node.name[:80]}.{own[0].name} ({self.source.line(own[0])})"
                    self.bypassed = f"{place} takes the place of GRPOTrainer's"

    def _model(self, given: Given, model: ast.expr | None, trainer: Call) -> None:
        """The name of the model and the dtype of its weights, where the script loads it with literal arguments."""
        value = self.source.values(model, trainer.scope, trainer.time) if model is not None else UNKNOWN
        if isinstance(value, str):
            given.values.setdefault("model_name_or_path", value)
            return
        if not isinstance(model, ast.Name):
            return
        bindings, home = self.source.bound(model.id, trainer.scope, trainer.time)
        made = bindings[0].value if len(bindings) == 1 and home is not None else None
        if not isinstance(made, ast.Call) or not self.source.dotted(made.func).endswith(".from_pretrained"):
            return
        call = Call(made, "", home or trainer.scope, bindings[0].time, direct=True)
        name = self.source.values(made.args[0], call.scope, call.time) if made.args else None
        options = self.source.given(call).values
        name = options.get("pretrained_model_name_or_path", name)
        if isinstance(name, str):
            given.values.setdefault("model_name_or_path", name)
        for key in ("dtype", "torch_dtype"):
            if isinstance(options.get(key), str) and "model_init_kwargs" not in given.values:
                given.values.setdefault("torch_dtype", options[key])

    def _unsloth(self, given: Given) -> bool:
        """Whether unsloth is imported; then its samplers are those of the model that it loads."""
        modules = {name.partition(".")[0] for name in self.source.imports.values()}
        if not modules & {"unsloth", "unsloth_zoo"}:
            return False
        given.values["use_peft"] = (
            True  # adapters, or weights of its own choice: the rule on their dtype does not apply
        )
        for call in [c for c in self.source.calls if c.name.endswith(".from_pretrained")][:_MAX_CALLS]:
            options = self.source.given(call)
            fast = options.values.get("fast_inference")
            if fast is True:  # the trainer then samples with the engine of the model
                given.set("use_vllm", True)
            elif "fast_inference" in options.unread or options.opened:
                text = options.unread.get("fast_inference", "; ".join(options.opened))
                given.set("use_vllm", UNKNOWN, f"fast_inference of {text}")
        return True


def _around(scope: Scope | None) -> list[Scope]:
    found: list[Scope] = []
    while scope is not None:
        found.append(scope)
        scope = scope.parent
    return found


def _default_objective() -> str:
    from bandpo.integrations.trl.config import BandGRPOConfig

    return str(next(f.default for f in fields(BandGRPOConfig) if f.name == "objective"))
