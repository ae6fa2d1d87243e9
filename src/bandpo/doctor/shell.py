"""What the commands of a shell script would be given, found without a shell: nothing is executed.

Variables, defaults (`${N:-4}`), arrays, arithmetic, conditions on known values, short loops and functions are followed. The
script is taken to be run without arguments, and variables that it does not set are taken as unset where it has a default for
them; `Script.assumed` lists these. What depends on anything else (the output of a command, the environment, a file that is
sourced) is not known, and neither is what follows from it: the literal beginning of a word is known, the rest is not.
"""

import ast
import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from bandpo.doctor import shell_syntax as syntax
from bandpo.doctor.shell_syntax import Part, Source, Statement

_MAX_TEXT, _MAX_STEPS = 1 << 21, 100_000  # characters that expansions may make, and statements that may run
_MAX_CALLS, _MAX_ROUNDS = 12, 32  # functions within each other, and rounds of a loop over words
_PARAMETER = re.compile(
    r"\$\{(#?)([A-Za-z_]\w*|[0-9]+|[@*#])(?:\[([@*]|[0-9]+)\])?(?:(:?[-+=?]|##?|%%?|//?|:)(.*))?\}", re.DOTALL
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_SEVERAL = re.compile(r"\$\{?@|\$\{[A-Za-z_]\w*\[@\]")  # a word for each value, also in quotes
_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)")
_ARITHMETIC = re.compile(r"[0-9\s+\-*/%()<>=!&|]*")
_SETTING = re.compile(r"\$\{([A-Za-z_]\w*):?=")
_COUNTING = re.compile(  # N=..., N+=..., N++ and --N within arithmetic
    r"([A-Za-z_]\w*)\s*(?:(?:[-+*/%&|^]|<<|>>)?=(?!=)|\+\+|--)|(?:\+\+|--)\s*([A-Za-z_]\w*)"
)
_OUTPUT = re.compile(r"`|\$\((?!\()")  # the output of a command
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(?:\[[^\]]*\])?\+?=")
_SUBSCRIPT = re.compile(r"\[[^\]]*\]\+?=")
_MAX_FORMULA, _LARGEST = 1000, 2**63 - 1
# Set by every shell, so that a default for them never counts.
_ALWAYS_SET = frozenset(
    {
        "HOME",
        "USER",
        "LOGNAME",
        "PWD",
        "OLDPWD",
        "PATH",
        "SHELL",
        "HOSTNAME",
        "HOSTTYPE",
        "RANDOM",
        "SECONDS",
        "LINENO",
        "UID",
    }
    | {"EUID", "PPID", "IFS", "LANG", "TERM", "BASH", "BASH_SOURCE", "BASH_VERSION", "BASHPID", "EPOCHSECONDS", "SHLVL"}
    | {"FUNCNAME", "OPTIND", "PIPESTATUS", "REPLY"}
)
_READING = frozenset({"read", "mapfile", "readarray", "getopts", "let", "printf"})
_DECLARING = frozenset({"export", "declare", "local", "readonly", "typeset"})
# What starts an environment sets PATH and its own variables, none of a run's.
_HARMLESS = re.compile(r"(?:.*/)?(?:activate|conda\.sh)(?: [\w.-]+)?|\$\(conda shell\.\w+ hook\)")
_OPTIONS = frozenset(
    {"pipefail", "errexit", "nounset", "xtrace", "noglob", "allexport", "errtrace", "posix", "verbose"}
)
_OPERATORS = frozenset({"=", "==", "!=", "-eq", "-ne", "-lt", "-le", "-gt", "-ge", "=~", "!", "-n", "-z"})
_SHELLS = re.compile(r"(?:.*/)?(?:ba|da|z)?sh")


@dataclass(frozen=True)
class Word:
    """A word of a command, as the command would be given it.

    Args:
        text: The word without its quotes; an expansion whose value is not known is left as it is written.
        known: Number of characters before the first of these; all of them where there is none.
        line: The line on which it is written, from 1; 0 where it is of no line.
        unknown: Beginning and end of each expansion whose value is not known.
    """

    text: str
    known: int
    line: int = field(default=0, compare=False)
    unknown: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)

    @property
    def literal(self) -> bool:
        """Whether all of the word is known."""
        return self.known == len(self.text)


@dataclass
class Script:
    """The commands of a script, and the values that it assigns.

    Args:
        commands: The words of each command that runs, or may run.
        variables: All values that are assigned to a name, in order; an array gives one value for each of its words.
        here: Delimiters of the here-documents; their text is not read.
        assumed: What was taken as unset: names of variables, and "@" for the arguments of the script.
        opened: Statements that may change any variable, such as `source FILE`, each with its line.
        uncertain: Whether some of the commands run only on a condition that is not known.
    """

    commands: list[list[Word]] = field(default_factory=list[list[Word]])
    variables: dict[str, list[Word]] = field(default_factory=dict[str, list[Word]])
    here: list[str] = field(default_factory=list[str])
    assumed: dict[str, None] = field(default_factory=dict[str, None])
    opened: list[str] = field(default_factory=list[str])
    uncertain: bool = False


def read_script(text: str) -> Script:
    r"""The commands of a script with their words expanded as a shell would do it.

    Args:
        text: A script of a POSIX shell or of Bash.

    Returns:
        The words of its commands and the values of its variables.

    Raises:
        ValueError: If it is nested too deeply, or its expansions would be too long.

    Examples:
        >>> script = read_script("N=${N:-4}\npython -m train a.b=$((N * 2)) c.d=$(date) 'e f'  # why")
        >>> [(w.text, w.literal) for w in script.commands[0][2:]]
        [('train', True), ('a.b=8', True), ('c.d=$(date)', False), ('e f', True)]
        >>> list(script.assumed)
        ['N']
    """
    parsed = syntax.parse(text)
    shell = _Shell(arguments=())
    shell.run_script(parsed.statements)
    if shell.ended and not any(_is_run(command) for command in shell.script.commands):
        # It stops early, with a message about its usage: arguments or the environment are needed, and not known.
        shell = _Shell(arguments=None)
        shell.needs_environment = True
        shell.run_script(parsed.statements)
    shell.script.here = parsed.here
    return shell.script


def _is_run(command: Sequence[Word]) -> bool:
    """Whether a command has settings, as `NAME.NAME=value` or as options."""
    if command[0].text in ("echo", "printf"):
        return False
    settings = (
        word.text.startswith("--") or "." in word.text.partition("=")[0] for word in command if "=" in word.text
    )
    return any(settings) or any(re.match("--[a-z]", word.text) for word in command)


# ---- values ----

Values: TypeAlias = tuple[Word, ...]
_NOT_KNOWN = None
Value: TypeAlias = Values | None  # the words of an array, one word of a scalar; None where it is not known


class _End(Exception):
    """`exit`, `return`, `break` or `continue`."""

    def __init__(self, what: str) -> None:
        self.what = what


class _Shell:
    def __init__(self, arguments: Values | None, depth: int = 0) -> None:
        self.script = Script()
        self.values = dict[str, Value]()
        self.functions = dict[str, list[Statement]]()
        self.unsure_functions = set[str]()  # defined by statements that may not run
        self.exported = set[str]()
        self.exports_all = False  # set -a
        self.typed = set[str]()  # declare -i, -l, -u: what is assigned to them is changed
        self.arguments, self.depth = arguments, depth
        self.without_arguments = not arguments  # those of the script, which it is taken to be run without
        self.scopes = list[dict[str, tuple[bool, Value]]]()  # what statements that may not run have changed
        self.locals = list[dict[str, tuple[bool, Value]]]()  # what the functions that run have hidden
        self.any_changed = False  # a sourced file may have set any variable
        self.testing = False  # words of a condition are expanded
        self.unsure = 0  # how many statements around may not run
        self.may_leave = False  # a statement that may not run leaves a loop or a function
        self.calls = self.loops = self.steps = self.length = 0
        self.ended = False
        self.needs_environment = False  # conditions on variables that the script does not set are not known

    def run_script(self, statements: list[Statement]) -> None:
        """Run all; `ended` tells whether the script ended before its last statement."""
        try:
            self.run(statements)
        except _End:
            self.ended = True

    def run(self, statements: Sequence[Statement]) -> bool | None:
        """Run statements, and give the status of the last one: success, failure, or None where it is not known."""
        status: bool | None = True
        for statement in statements:
            status = self.step(statement)
        return status

    def step(self, statement: Statement) -> bool | None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise ValueError(f"the script runs more than {_MAX_STEPS} statements")
        match statement:
            case syntax.Command():
                return self._command(statement)
            case syntax.Test():
                return _any_of(self._operands(statement.tokens))
            case syntax.Chain():
                return self._chain(statement)
            case syntax.Pipeline():
                statuses = [self._apart([command]) for command in statement.commands]
                return None if statuses[-1] is None else statuses[-1] != statement.negated
            case syntax.If():
                return self._if(statement)
            case syntax.Loop():
                return self._loop(statement)
            case syntax.Case():
                return self._case(statement)
            case syntax.Group():
                return self._apart(statement.body) if statement.subshell else self.run(statement.body)
            case syntax.Function():
                self.functions[statement.name] = statement.body
                (self.unsure_functions.add if self.unsure else self.unsure_functions.discard)(statement.name)
                return True
            case syntax.Opaque():
                for name in statement.names:
                    self._set(name, _NOT_KNOWN)
                return None

    # ---- what may or may not run ----

    def _scoped(self, statements: Sequence[Statement], *, apart: bool = False) -> tuple[bool | None, set[str]]:
        """Run statements that may not run, take their changes back, and give the names that they change."""
        self.scopes.append({})
        opened, status = self.any_changed, None
        try:
            status = self.run(statements)
        except _End as end:
            self.may_leave |= end.what != "exit" and not apart
        finally:
            before = self.scopes.pop()
            self._restore(before)
        self.any_changed = opened or self.any_changed
        return status, set(before)

    def _restore(self, before: Mapping[str, tuple[bool, Value]]) -> None:
        for name, (was_set, value) in before.items():
            if was_set:
                self.values[name] = value
            else:
                self.values.pop(name, None)

    def _maybe(self, *branches: Sequence[Statement]) -> None:
        """Run branches of which one, or none, runs: what they change is not known afterwards."""
        self.script.uncertain = True
        self.unsure += 1
        changed = set[str]().union(*[self._scoped(branch)[1] for branch in branches])
        self.unsure -= 1
        for name in sorted(changed):
            self._set(name, _NOT_KNOWN)

    def _apart(self, statements: Sequence[Statement]) -> bool | None:
        """Run in a shell of its own: changes end with it."""
        functions, arguments, loops = dict(self.functions), self.arguments, self.loops
        self.loops = 0  # a loop around it is not its own to leave
        status, _ = self._scoped(statements, apart=True)
        self.functions, self.arguments, self.loops = functions, arguments, loops
        return status

    def _chain(self, chain: syntax.Chain) -> bool | None:
        left = self.step(chain.left)
        if left is None:
            self._maybe([chain.right])
            return None
        return self.step(chain.right) if left == (chain.operator == "&&") else left

    def _if(self, statement: syntax.If) -> bool | None:
        for i, (condition, body) in enumerate(statement.branches):
            holds = self.run(condition)
            if holds is None:
                rest = statement.branches[i + 1 :]
                for name in sorted(self._changed_in([s for conditions, _ in rest for s in conditions])):
                    self._set(name, _NOT_KNOWN)
                self._maybe(body, *[part for pair in rest for part in pair], statement.otherwise)
                return None
            if holds:
                return self.run(body)
        return self.run(statement.otherwise)

    def _case(self, statement: syntax.Case) -> bool | None:
        self.testing = True
        word = self._joined(statement.word)
        self.testing = False
        rest = list(statement.branches)
        while rest:
            patterns, body = rest[0]
            matches = [_matches(_text(word), self._pattern(p)) for p in patterns]
            if True in matches and None not in matches[: matches.index(True)] and not statement.falls:
                return self.run(body)
            if None in matches or True in matches:
                self._maybe(*[body for _, body in rest])
                return None
            rest.pop(0)
        return True

    def _loop(self, loop: syntax.Loop) -> bool | None:
        if loop.words is not None and loop.variable is not None:
            words = [w for source in loop.words for w in self.expand(source)]
            leaves = any(
                _name_of(s) in ("break", "continue") and _written(s) for s in syntax.walk(loop.body)
            )  # of two loops
            if all(word.literal for word in words) and len(words) <= _MAX_ROUNDS and not leaves:
                return self._rounds(loop.variable, words, loop.body)
        changed = self._changed_in([*loop.condition, *loop.body])
        if loop.variable is None:
            holds = self.run(loop.condition)
            if holds is not None and holds == loop.until:
                return True
        else:
            changed.add(loop.variable)
        for name in sorted(changed):
            self._set(name, _NOT_KNOWN)
        self.loops += 1
        self._maybe(loop.body)
        self.loops -= 1
        self.may_leave = False  # all that it sets is unknown
        for name in sorted(changed):
            self._set(name, _NOT_KNOWN)
        return None

    def _rounds(self, variable: str, words: Sequence[Word], body: Sequence[Statement]) -> bool | None:
        """The rounds of a loop over known words."""
        for word in words:
            self._set(variable, (word,))
            self.loops += 1
            try:
                self.run(body)
            except _End as end:
                if end.what == "break":
                    break
                if end.what != "continue":
                    raise
            finally:
                self.loops -= 1
                self._after_leaving(body)
        return None if words else True

    def _after_leaving(self, body: Sequence[Statement]) -> None:
        """Where a body may have been left early, what it sets is not known afterwards."""
        if self.may_leave:
            self.may_leave = False
            for name in sorted(self._changed_in(body)):
                self._set(name, _NOT_KNOWN)

    def _changed_in(self, statements: Sequence[Statement]) -> set[str]:
        """The variables that statements may change; all are opened where they run what is not read."""
        found, seen, pending = set[str](), set[str](), list(syntax.walk(list(statements)))
        while pending:
            statement = pending.pop()
            if isinstance(statement, syntax.Opaque):
                found |= statement.names
            elif isinstance(statement, syntax.Loop) and statement.variable is not None:
                found.add(statement.variable)
            if not isinstance(statement, syntax.Command):
                continue
            name = _name_of(statement)
            found |= {a.name for a in statement.assignments}
            given = [w for a in statement.assignments for w in (a.value if isinstance(a.value, tuple) else (a.value,))]
            for part in (p for word in (*statement.words, *given) for p in word.parts):
                found |= {*_SETTING.findall(part.text), *_counted(part)}
            if name in _READING or name in _DECLARING or name == "unset":
                found |= {m for word in statement.words for p in word.parts for m in _NAME.findall(p.text)}
            if name in ("source", ".", "eval") and not any(map(_HARMLESS.fullmatch, _written(statement))):
                self._open([Word(name, len(name), statement.words[0].line)])
            body = self.functions.get(name or "")
            if body and name and name not in seen:
                seen.add(name)
                pending += syntax.walk(body)
        return found

    # ---- commands ----

    def _command(self, command: syntax.Command) -> bool | None:
        values = [(a, self._assigned(a)) for a in command.assignments]
        self.testing = _name_of(command) in ("[", "test")
        words = self._words(command.words)
        self.testing = False
        declares = bool(words) and words[0].literal and words[0].text in _DECLARING
        if not words or declares:
            local = declares and _is_local(words[0].text, _flags(words[1:]))
            for assignment, value in values:
                if local:
                    self._hide(assignment.name)
                self._set(assignment.name, value)
        for assignment, value in values:
            self._record(assignment.name, value)
        if not words:
            return True if not command.words and not any(map(_has_output, command.assignments)) else None
        if not words[0].literal:
            self.script.commands.append(words)
            return None
        return self._call(words, {a.name: v for a, v in values}, command)

    def _call(self, words: list[Word], given: Mapping[str, Value], statement: syntax.Command) -> bool | None:
        name, arguments = words[0].text, words[1:]
        if name in self.functions:
            return self._function(words, given, statement)
        if name == "exit" or (name == "return" and self.calls) or (name in ("break", "continue") and self.loops):
            raise _End(name)
        if name in ("return", "break", "continue"):
            return None  # out of place: the shell complains, and continues
        if name in (":", "true", "false"):
            return name != "false"
        if name in ("[", "test"):
            operands = arguments[:-1] if name == "[" else arguments
            return _tested([_Operand(_text(w), glob.escape(w.text) if w.literal else None) for w in operands])
        if name in _DECLARING:
            return self._declare(arguments, name)
        if name == "eval" and not given and all(w.literal for w in arguments) and self.calls < _MAX_CALLS:
            self.calls += 1
            try:
                text = " ".join(word.text for word in arguments)
                self._count(len(text))
                return self.run(syntax.parse(text).statements)
            finally:
                self.calls -= 1
        if name in ("source", ".", "eval"):
            if not _HARMLESS.fullmatch(" ".join(word.text for word in arguments)):
                self._open(words)
            return None
        if name == "unset":
            for word in arguments:
                found = _NAME.match(word.text)
                if found is not None and found.end() <= word.known:  # also of an element, NAME[0]
                    self._set(found[0], _NOT_KNOWN)
                elif not word.literal:
                    self._open(words)
            return True
        if name in ("set", "shift"):
            self._set_arguments(name, arguments)
            return True
        if name in _READING:
            for word in arguments:
                for found in _NAME.findall(word.text):
                    self._set(found, _NOT_KNOWN)
            return None
        self.script.commands.append(words)
        self._inner_shell(words, given)
        return None

    def _function(self, words: Sequence[Word], given: Mapping[str, Value], statement: syntax.Command) -> bool | None:
        name, body = words[0].text, self.functions[words[0].text]
        if self.calls >= _MAX_CALLS or name in self.unsure_functions:
            if self.calls < _MAX_CALLS:
                self.unsure_functions.discard(name)
                self._maybe([statement])
                self.unsure_functions.add(name)
            self._open(words)
            return None
        outer, self.arguments = (self.arguments, self.without_arguments), tuple(words[1:])
        self.without_arguments = False
        self.calls, loops, self.loops = self.calls + 1, self.loops, 0  # a loop around it is not the function's to leave
        self.locals.append({})
        for variable, value in given.items():
            self._hide(variable)
            self._set(variable, value)
        try:
            return self.run(body)
        except _End as end:
            if end.what != "return":
                raise
            return None
        finally:
            self.calls, self.loops = self.calls - 1, loops
            self.arguments, self.without_arguments = outer
            self._after_leaving(body)
            for name, (_, value) in self.locals.pop().items():
                self._set(name, value)

    def _declare(self, arguments: Sequence[Word], name: str) -> bool:
        flags = _flags(arguments)
        exports, local = (name == "export" and "n" not in flags) or "x" in flags, _is_local(name, flags)
        if "n" in flags and name != "export":  # another name for a variable
            self._open([Word(name, len(name), arguments[0].line), *arguments])
        for word in arguments:
            found = _NAME.match(word.text)
            if found is not None and flags & set("ilu"):
                self.typed.add(found[0])
            if found is not None and name == "export" and "n" in flags:
                self.exported.discard(found[0])
            match = re.compile(r"([A-Za-z_]\w*)(\+?)=").match(word.text)
            if match is not None and match.end() <= word.known:
                value = _NOT_KNOWN if match[2] else (_after(word, match.end()),)
                if local:
                    self._hide(match[1])
                self._set(match[1], value)
                self._record(match[1], value)
                if exports:
                    self.exported.add(match[1])
            elif word.literal and _NAME.fullmatch(word.text):
                if exports:
                    self.exported.add(word.text)
                elif self.locals and local:
                    self._hide(word.text)
                    self._set(word.text, _NOT_KNOWN)
            elif not word.literal and word.known == 0:
                self._open([Word(name, len(name), word.line), word])
        return True

    def _set_arguments(self, name: str, arguments: Sequence[Word]) -> None:
        if name == "set":
            texts = [word.text for word in arguments]
            options = texts[: texts.index("--")] if "--" in texts else texts
            for sign, follower in zip(options, [*options[1:], ""], strict=False):
                if re.fullmatch(r"[-+](?:\w*a\w*|o)", sign) and (sign[1:] != "o" or follower == "allexport"):
                    self.exports_all = sign[0] == "-"
            if "--" in texts:
                self.without_arguments = False
                given = tuple(arguments[texts.index("--") + 1 :])
                self.arguments = None if self.unsure or _may_be_several(given) else given
            elif any(not text.startswith(("-", "+")) for text in texts) and texts[:1] not in (["-o"], ["+o"]):
                known = all(text.startswith(("-", "+")) or text in _OPTIONS for text in texts)
                self.arguments = self.arguments if known else None
        elif self.arguments is not None:
            self.arguments = None if self.unsure else self.arguments[1:]

    def _open(self, words: Sequence[Word]) -> None:
        """A statement that may set any variable."""
        self.any_changed = True
        for name in sorted(self.values):
            self._set(name, _NOT_KNOWN)
        shown = " ".join(word.text for word in words)
        self.script.opened.append(f"line {words[0].line}: {shown}")

    def _inner_shell(self, words: Sequence[Word], given: Mapping[str, Value]) -> None:
        """Read the script in `bash -c 'script'`, also behind another command such as `ray job submit`."""
        texts = [word.text for word in words]
        for i in range(len(words) - 2):
            if _SHELLS.fullmatch(texts[i]) and re.compile(r"-\w*c").fullmatch(texts[i + 1]) and words[i + 2].literal:
                if self.depth >= 3:
                    return
                inner = _Shell(tuple(words[i + 4 :]), self.depth + 1)
                inner.values = {name: self.values[name] for name in self.exported if name in self.values} | dict(given)
                for word in words[:i]:  # env NAME=value, --export=NAME=value
                    match = re.compile(r"([A-Za-z_]\w*)=").match(word.text)
                    if match is not None and match.end() <= word.known:
                        inner.values[match[1]] = (_after(word, match.end()),)
                    else:
                        inner.values |= dict.fromkeys(re.findall(r"([A-Za-z_]\w*)=", word.text), _NOT_KNOWN)
                inner.any_changed = self.any_changed
                try:
                    inner.run_script(syntax.parse(texts[i + 2]).statements)
                except ValueError:
                    return
                line = words[i + 2].line
                found = [[replace(w, line=line) for w in command] for command in inner.script.commands]
                self.script.commands[-1] = list(words[: i + 2])
                self.script.commands += found
                self.script.assumed |= inner.script.assumed
                self.script.opened += inner.script.opened
                self.script.uncertain |= inner.script.uncertain
                return

    # ---- variables ----

    def _hide(self, name: str) -> None:
        """Keep the value that a variable of a function hides, until the function ends."""
        if self.locals and name not in self.locals[-1]:
            known, value = self._value(name)
            self.locals[-1][name] = (known, value if known and value else _NOT_KNOWN)

    def _set(self, name: str, value: Value) -> None:
        if self.scopes and name not in self.scopes[-1]:
            self.scopes[-1][name] = (name in self.values, self.values.get(name))
        if name in self.typed and not (value and all(_NUMBER.fullmatch(word.text) for word in value)):
            value = _NOT_KNOWN
        if self.exports_all:
            self.exported.add(name)
        self.values[name] = value

    def _record(self, name: str, value: Value) -> None:
        self.script.variables.setdefault(name, []).extend(value or ())

    def _assigned(self, assignment: syntax.Assignment) -> Value:
        if assignment.element:
            return _NOT_KNOWN
        before = self.values.get(assignment.name)
        if isinstance(assignment.value, tuple):
            if any(_SUBSCRIPT.match("".join(p.text for p in source.parts)) for source in assignment.value):
                return _NOT_KNOWN
            value: Value = tuple(w for source in assignment.value for w in self.expand(source))
        else:
            value = (self._joined(assignment.value, assigned=True),)
        if isinstance(assignment.value, tuple):
            whole = (before or ()) + value if assignment.adds else value
            if len(whole) == 1 and _may_be_several(whole):
                return _NOT_KNOWN
        if not assignment.adds:  # of an array, a single word sets the first element
            return value if isinstance(assignment.value, tuple) else (*value, *(before or ())[1:])
        if before is None:
            return _NOT_KNOWN
        if isinstance(assignment.value, tuple):
            return before + value
        return (_glued([*before, *value]),) if len(before) <= 1 else _NOT_KNOWN

    def _value(self, name: str) -> tuple[bool, Value]:
        """Whether a variable is known to be set or unset, and its value: an empty tuple where it is unset."""
        if name in ("@", "*"):
            if self.arguments == ():
                self.script.assumed["@"] = None
            return self.arguments is not None, self.arguments
        if name == "#":
            if self.arguments == () and self.without_arguments:
                self.script.assumed["@"] = None
            count = None if self.arguments is None else str(len(self.arguments))
            return count is not None, None if count is None else (Word(count, len(count)),)
        if name.isdigit():
            if self.arguments is None or name == "0":
                return False, None
            if self.arguments == ():
                self.script.assumed["@"] = None
            return True, self.arguments[int(name) - 1 : int(name)] if len(name) < 4 else ()
        if name in self.values:
            value = self.values[name]
            return value is not None, value
        if self.any_changed or name in _ALWAYS_SET:
            return False, None
        return True, ()

    # ---- expansions ----

    def _words(self, sources: Sequence[Source]) -> list[Word]:
        """The words of a command; what `export` and its like assign is not split, if they are written without quotes."""
        declares = bool(sources) and sources[0].plain in _DECLARING
        found = list[Word]()
        for source in sources:
            head = _ASSIGNMENT.match(_first_text(source)) if declares else None
            found += self.expand(source) if head is None else [self._declared(source, head[0])]
        return found

    def _declared(self, source: Source, head: str) -> Word:
        """`NAME=value` as an argument of `export` and its like."""
        first = replace(source.parts[0], text=source.parts[0].text[len(head) :])
        value = Source((first, *source.parts[1:]), source.line)
        if syntax.may_be_braces(source):  # they are expanded here, unlike those of an assignment
            after = _word_of([("".join(part.text for part in value.parts), False)], source.line)
        else:
            after = self._joined(value, assigned=True)
        return _glued([_as_word(head), after], line=source.line)

    def expand(self, source: Source) -> list[Word]:
        """The words that a word of a command becomes."""
        pieces = _Pieces(source.line, self._count, splits="IFS" not in self.values)
        unknown = syntax.may_be_braces(source) or _has_home(source)
        for part in source.parts:
            if unknown or part.kind == "unknown":
                pieces.add(part.text, known=False)
            elif part.kind == "text":
                pieces.add_text(part)
            elif part.kind == "arithmetic":
                number = self._arithmetic(part.text[3:-2])
                for name in sorted(_counted(part)):
                    self._set(name, _NOT_KNOWN)
                pieces.add(part.text if number is None else str(number), known=number is not None)
                pieces.exists = True
            else:
                value = self._parameter(part)
                joined = sum(bool(other.text) for other in source.parts) > 1  # to text before or after it
                if joined and value is not None and len(value) > 1 and _may_be_several(value):
                    value = None
                pieces.add_value(part, value)
        return pieces.words()

    def _joined(self, source: Source, *, assigned: bool = False) -> Word:
        """The value of a word that is not split, as in an assignment."""
        quoted = Source(tuple(Part(p.kind, p.text, quoted=True) for p in source.parts), source.line)
        if assigned and _has_home(source, assigned=True):
            return _word_of([("".join(p.text for p in source.parts), False)], source.line)
        words = self.expand(quoted)
        return _glued(words, " ", source.line)

    def _operands(self, tokens: Sequence[Source | str]) -> "list[_Operand]":
        self.testing = True
        found: list[_Operand] = []
        for token in tokens:
            if isinstance(token, str) or token.plain in _OPERATORS:
                found.append(_Operand(token if isinstance(token, str) else token.plain, None, operator=True))
            else:
                found.append(_Operand(_text(self._joined(token)), self._pattern(token)))
        self.testing = False
        return found

    def _pattern(self, source: Source) -> str | None:
        """A pattern as `fnmatch` has them, in which quoted text stands for itself; None where it is not known."""
        found = list[str]()
        for part in source.parts:
            text = _text(self._joined(Source((part,), source.line)))
            if text is None or (not part.quoted and any(c in text for c in "[]\\")):
                return None
            found.append(glob.escape(text) if part.quoted else text)
        return "".join(found)

    def _parameter(self, part: Part) -> Value:
        """The value of `$NAME` or `${NAME...}`; None where it is not known."""
        text = part.text
        if not text.startswith("${"):
            name = text[1:]
            known, value = self._value(name)
            if name in ("?", "$", "!", "-") or not known:
                return None
            if value == () and name not in ("@", "*") and (not name.isdigit() or self.without_arguments):
                return self._unset(name)
            return value if name in ("@", "*") else value and value[:1]
        match = _PARAMETER.fullmatch(text)
        if match is None:
            return None
        length, name, index, operator, argument = match.groups()
        known, value = self._value(name)
        if operator is not None and operator.lstrip(":") in ("-", "+", "=", "?"):
            return self._defaulted(part, name, (known, value), operator, argument)
        if not known or value is None:
            return None
        is_open = name not in self.values and (not name.isdigit() or self.without_arguments)
        if value == () and name not in ("@", "*") and is_open:
            return self._unset(name) if operator is None and not length else None
        positions = bool(length or operator) or index not in ("@", "*")
        if len(value) > 1 and name not in ("@", "*") and positions and _may_be_several(value):
            return None
        if index is not None and index.isdigit():
            value = value[int(index) : int(index) + 1] if len(index) < 6 else ()
        elif index is None and name not in ("@", "*"):
            value = value[:1]
        if length:
            return _length(value, counts=index in ("@", "*"))
        if operator is None:
            return value
        if operator == ":":
            return _sliced(
                value, argument, counts=name in ("@", "*") or index in ("@", "*"), arguments=name in ("@", "*")
            )
        return self._trimmed(value, operator, argument)

    def _unset(self, name: str) -> Value:
        """A variable that the script does not set: empty in a condition, and otherwise what the environment has."""
        if not self.testing or self.needs_environment:
            return None
        self.script.assumed["@" if name.isdigit() else name] = None
        return ()

    def _defaulted(self, part: Part, name: str, found: tuple[bool, Value], operator: str, argument: str) -> Value:
        known, value = found
        if not known:
            return None
        first = (value or ())[:1]
        if first and not first[0].literal and not first[0].known:
            return None  # it may be empty
        is_set = bool(first) and (":" not in operator or bool(first[0].text))
        if not is_set and not value and name not in self.values and not name.isdigit() and name not in ("@", "*", "#"):
            self.script.assumed[name] = None
        kind = operator.lstrip(":")
        if kind == "+":
            return self._default(argument, part) if is_set else (Word("", 0),)
        if is_set:
            return value if name in ("@", "*") else first
        if kind == "?":
            return None
        default = self._default(argument, part)
        if kind == "=":
            self._set(name, default)
        return default

    def _default(self, text: str, part: Part) -> Value:
        """The word after `:-`, in which expansions count; with quotes only where they cannot matter."""
        if ("'" in text and part.quoted) or (
            ("'" in text or '"' in text) and not part.quoted and any(map(str.isspace, text))
        ):
            return None
        return (self._joined(syntax.parse_word(text)),)

    def _trimmed(self, value: Values, operator: str, pattern: str) -> Value:
        """`${NAME#pattern}` and `${NAME%pattern}` of literal patterns with at most one star at the outer end."""
        if operator in ("/", "//") or not all(word.literal for word in value):
            return None
        star = pattern[-1:] == "*" if operator[0] == "%" else pattern[:1] == "*"
        literal = (pattern[:-1] if operator[0] == "%" else pattern[1:]) if star else pattern
        if not literal or any(c in literal for c in "*?[]\\$`'\"{}"):
            return None
        return tuple(_as_word(_cut(word.text, literal, operator, star=star)) for word in value)

    def _arithmetic(self, text: str) -> int | None:
        """The value of `$((text))`; None where it is not known, or not of the plain operators."""
        expanded = self._joined(syntax.parse_word(text))
        if not expanded.literal or len(expanded.text) > _MAX_FORMULA:
            return None

        def number(match: re.Match[str]) -> str:
            known, value = self._value(match[0])
            if not known or value is None or len(value) != 1 or not value[0].literal:
                return "?"
            if value[0].text.strip() == "":
                return "0"
            return value[0].text if re.fullmatch(r"[+-]?[0-9]+", value[0].text) else "?"

        return _calculated(re.sub(r"(?<![\w$])[A-Za-z_]\w*", number, expanded.text))

    def _count(self, characters: int) -> None:
        self.length += characters
        if self.length > _MAX_TEXT:
            raise ValueError(f"its expansions make more than {_MAX_TEXT} characters")


class _Pieces:
    """The pieces of a word, which becomes several where an expansion without quotes has blanks in it."""

    def __init__(self, line: int, count: Callable[[int], None], *, splits: bool) -> None:
        self.line, self.count = line, count
        self.splits = splits  # whether at blanks, as without a value of IFS
        self.found = list[Word]()
        self.pieces, self.exists = list[tuple[str, bool]](), False
        self.existed = False  # before the text in quotes that is being read
        self.nothing = False  # this text has a "$@" of nothing, and makes no word unless it has characters

    def add(self, text: str, *, known: bool) -> None:
        self.count(len(text))
        self.pieces.append((text, known))
        self.exists |= not known

    def add_text(self, part: Part) -> None:
        """Literal text; an empty one in quotes is their beginning."""
        if part.quoted and not part.text:
            self.existed, self.nothing = self.exists, False
        self.add(part.text, known=True)
        self.exists |= (part.quoted and not self.nothing) or bool(part.text)

    def add_value(self, part: Part, value: Value) -> None:
        if value is None:
            self.add(part.text, known=False)
            return
        several = _SEVERAL.match(part.text) is not None
        if not self.splits and not (several if part.quoted else not value) and (not part.quoted or len(value) > 1):
            self.add(part.text, known=False)
            return
        if part.quoted and not several:
            value = (_glued(list(value), " "),)
        elif part.quoted and not value and not any(text for text, _ in self.pieces):
            self.exists, self.nothing = self.existed, True
        for i, word in enumerate(value):
            if i:
                self._break()
            for text, known in _pieces_of(word):
                if known and not part.quoted:
                    self._add_split(text)
                else:
                    self.exists |= not self.nothing or several or bool(text)
                    self.add(text, known=known)

    def _add_split(self, text: str) -> None:
        """A known text without quotes, which is split at its blanks."""
        fields = text.split()
        if text[:1].isspace():
            self._break()
        for i, each in enumerate(fields):
            if i:
                self._break()
            self.exists = True
            self.add(each, known=True)
        if fields and text[-1:].isspace():
            self._break()

    def _break(self) -> None:
        """The word ends here, and another one begins."""
        if self.exists:
            self.found.append(_word_of(self.pieces, self.line))
        self.pieces, self.exists, self.existed = [], False, False

    def words(self) -> list[Word]:
        self._break()
        return self.found


def _word_of(pieces: Iterable[tuple[str, bool]], line: int) -> Word:
    texts, unknown, length = list[str](), list[tuple[int, int]](), 0
    for text, known in pieces:
        if not known:
            unknown.append((length, length + len(text)))
        texts.append(text)
        length += len(text)
    return Word("".join(texts), unknown[0][0] if unknown else length, line, tuple(unknown))


def _pieces_of(word: Word) -> list[tuple[str, bool]]:
    found, at = list[tuple[str, bool]](), 0
    for start, end in word.unknown:
        found += [(word.text[at:start], True), (word.text[start:end], False)]
        at = end
    return [*found, (word.text[at:], True)]


# ---- conditions ----


@dataclass(frozen=True)
class _Operand:
    """A word of a condition, and what it is as a pattern; None where it is not known."""

    text: str | None
    pattern: str | None
    operator: bool = False


def _any_of(operands: Sequence[_Operand]) -> bool | None:
    """`[[ ... ]]`: parts joined by || and &&, without parentheses."""
    if any(o.operator and o.text in ("(", ")", "<", ">") for o in operands):
        return None
    some: list[bool | None] = []
    for part in _split(operands, "||"):
        each = [_tested(condition) for condition in _split(part, "&&")]
        some.append(False if False in each else None if None in each else True)
    return True if True in some else None if None in some else False


def _split(operands: Sequence[_Operand], at: str) -> list[list[_Operand]]:
    found: list[list[_Operand]] = [[]]
    for operand in operands:
        if operand.operator and operand.text == at:
            found.append([])
        else:
            found[-1].append(operand)
    return found


def _tested(operands: Sequence[_Operand]) -> bool | None:
    """A condition on strings or whole numbers; None where it is on files, or on what is not known."""
    texts = [operand.text for operand in operands]
    match operands:
        case []:
            return False
        case [first, *_] if first.text == "!" and len(operands) > 1:
            holds = _tested(operands[1:])
            return None if holds is None else not holds
        case [only]:
            return None if only.text is None else only.text != ""
        case [sign, word] if sign.text in ("-n", "-z"):
            return None if word.text is None else (word.text == "") == (sign.text == "-z")
        case [left, sign, right] if sign.text in ("=", "==", "!="):
            same = _matches(left.text, right.pattern)
            return None if same is None else same == (sign.text != "!=")
        case [_, sign, _] if sign.text in _COMPARED and all(_NUMBER.fullmatch(texts[i] or "?") for i in (0, 2)):
            return _COMPARED[sign.text](int(texts[0] or 0), int(texts[2] or 0))
        case _:
            return None


_COMPARED: Mapping[str | None, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}


def _matches(text: str | None, pattern: str | None) -> bool | None:
    if text is None or pattern is None or len(pattern) * len(text) > _MAX_FORMULA**2:
        return None
    return fnmatchcase(text, pattern)


def _counted(part: Part) -> set[str]:
    """The variables that arithmetic in an expansion changes."""
    if "((" not in part.text or part.kind == "text":
        return set()
    return {name for pair in _COUNTING.findall(part.text) for name in pair if name}


def _has_output(assignment: syntax.Assignment) -> bool:
    """Whether a value has the output of a command in it, whose status is that of the assignment."""
    values = assignment.value if isinstance(assignment.value, tuple) else (assignment.value,)
    return any(p.kind != "text" and _OUTPUT.search(p.text) is not None for value in values for p in value.parts)


def _first_text(source: Source) -> str:
    """The unquoted text that a word begins with."""
    first = source.parts[0] if source.parts else Part("text", "", quoted=True)
    return first.text if first.kind == "text" and not first.quoted else ""


def _has_home(source: Source, *, assigned: bool = False) -> bool:
    """Whether a word has a `~` for which the shell may put a folder: its first character, and more in an assignment."""
    if _first_text(source).startswith("~"):
        return True
    begins = "^|[:=]" if assigned or _ASSIGNMENT.match(_first_text(source)) else "(?!)"
    return any(not p.quoted and p.kind == "text" and re.search(f"(?:{begins})~", p.text) for p in source.parts)


def _flags(arguments: Sequence[Word]) -> set[str]:
    """The letters of the options of `declare` and its like."""
    return {letter for word in arguments if word.text.startswith("-") for letter in word.text[1:]}


def _is_local(name: str, flags: set[str]) -> bool:
    """Whether `declare` and its like make a variable of the function."""
    return name in ("declare", "local", "typeset") and "g" not in flags


def _written(statement: Statement) -> list[str]:
    """The arguments of a command as they are written."""
    words = statement.words[1:] if isinstance(statement, syntax.Command) else []
    return ["".join(part.text for part in word.parts) for word in words]


def _name_of(statement: Statement) -> str | None:
    """The first word of a command, if it is written without quotes."""
    return statement.words[0].plain if isinstance(statement, syntax.Command) and statement.words else None


# ---- words and numbers ----


def _glued(words: Sequence[Word], between: str = "", line: int = 0) -> Word:
    """One word made of several."""
    pieces = list[tuple[str, bool]]()
    for i, word in enumerate(words):
        pieces += [(between, True)] if i and between else []
        pieces += _pieces_of(word)
    return _word_of(pieces, line)


def _after(word: Word, begin: int) -> Word:
    """The word without its first characters, which are known."""
    spans = tuple((a - begin, b - begin) for a, b in word.unknown)
    return Word(word.text[begin:], word.known - begin, word.line, spans)


def _as_word(text: str) -> Word:
    return Word(text, len(text))


def _may_be_several(words: Sequence[Word]) -> bool:
    """Whether one of the words of an array is wholly unknown, and so may be several words, or none."""
    return any(not word.known and not word.literal for word in words)


def _length(value: Values, *, counts: bool) -> Value:
    if counts:
        return (_as_word(str(len(value))),)
    word = value[0] if value else Word("", 0)
    return (_as_word(str(len(word.text))),) if word.literal and word.text.isascii() else None


def _sliced(value: Values, argument: str, *, counts: bool, arguments: bool) -> Value:
    """`${NAME:start}` and `${NAME:start:length}`: of the words of an array or the arguments, else of the characters."""
    match = re.compile(r"[ ]*([0-9]{1,6})[ ]*(?::[ ]*([0-9]{1,6})[ ]*)?").fullmatch(argument)
    if match is None or (arguments and match[1] == "0"):  # ${@:0} begins with the name of the script
        return None
    start = int(match[1]) - arguments
    end = None if match[2] is None else start + int(match[2])
    if counts:
        return value[start:end]
    word = value[0] if value else Word("", 0)
    return (_as_word(word.text[start:end]),) if word.literal else None


def _cut(text: str, literal: str, operator: str, *, star: bool) -> str:
    """The text without the end (`%`) or the beginning (`#`) that a pattern matches; the longest one for `%%` and `##`."""
    if not star:
        return text.removesuffix(literal) if operator[0] == "%" else text.removeprefix(literal)
    at = text.rfind(literal) if operator in ("%", "##") else text.find(literal)
    if at < 0:
        return text
    return text[:at] if operator[0] == "%" else text[at + len(literal) :]


def _calculated(text: str) -> int | None:
    """A formula of numbers in the shell's whole-number arithmetic; None for what is not a plain operator."""
    if not _ARITHMETIC.fullmatch(text) or any(c in text for c in ("++", "--", "//")):
        return None
    try:
        text = re.sub(r"\b0[0-9]+", lambda match: str(int(match[0], 8)), text)
        tree = ast.parse(text.replace("&&", " and ").replace("||", " or ").strip(), mode="eval")
        return _number(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
        return None


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(found)):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner) if not _is_power(inner):
            found = -_number(inner) if isinstance(sign, ast.USub) else _number(inner)
        case ast.BinOp(left=left, op=operation, right=right):
            found = _operated(operation, _number(left), _number(right))
        case ast.Compare(left=left, ops=[operation], comparators=[right]):
            found = int(_ORDER[type(operation)](_number(left), _number(right)))
        case ast.BoolOp(op=operation, values=values):
            join = all if isinstance(operation, ast.And) else any
            found = int(join([_number(value) != 0 for value in values]))
        case _:
            raise ValueError("not a plain operator")
    if abs(found) > _LARGEST:
        raise ValueError("beyond 64 bits")
    return found


def _is_power(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)


def _operated(operation: ast.operator, a: int, b: int) -> int:
    match operation:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div() | ast.Mod():  # towards 0
            whole = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            return whole if isinstance(operation, ast.Div) else a - b * whole
        case ast.Pow() if 0 <= b <= 64:
            return a**b
        case _:
            raise ValueError("not a plain operator")


_ORDER: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


def _text(word: Word) -> str | None:
    return word.text if word.literal else None
