"""Secrets are kept out of all files and messages of a run: this module decides what a secret is, and hides it.

A secret is a value under a key that names one (`hub_token`, `WANDB_API_KEY`), the user part and the query of a URL, a token
of a well-known form (`hf_...`), and, wherever it occurs, the value of an environment variable or option that holds a secret.
"""

import contextlib
import copy
import html
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeGuard, TypeVar, cast
from urllib.parse import quote

HIDDEN = "<hidden>"
"""The text that replaces a secret."""

C = TypeVar("C", bound="HidesSecrets")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALWAYS = _words(
    """secret secrets password passwords passwd passphrase passcode pwd credential credentials apikey apikeys apitoken authtoken
    accesstoken auth authorization bearer cookie cookies jwt signature sig privatekey secretkey accesskey netrc"""
)
_KEYS = _words(
    """api access private secret account auth encryption signing storage ssh master shared client subscription service license
    wandb hf huggingface hub openai anthropic azure aws gcp google comet neptune mlflow clearml swanlab"""
)
"""`key` after one of these words names a secret; `sort_key` and `metric_key` do not."""
_TOKENS = _words(
    """pad eos bos unk sep cls mask image audio video stop start end next last first new special per eot boi eoi think tool
    prefix suffix middle"""
)
"""`token` after one of these words is a token of a language model."""
_PLURAL = _words("api auth access hub hf secret bearer session refresh")
_NOT_THE_SECRET = _words("file files path paths dir directory env name url uri type id index ids length count ttl")
"""A key that ends with one of these words names the place or a property of a secret, not the secret."""
_SHORTEST = 6
"""Shorter values of environment variables are not searched for: they would be found within ordinary words."""
_ORDINARY = _words("true false none null default disabled enabled password secret auto always never hidden <hidden>")

_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)(?P<rest>[^\s\"'<>`\\]*)")
_LOGIN = re.compile(r"(?<![\w/:.@-])[\w.+-]{1,64}:[^\s/@:'\"]{1,256}@(?=[\w-])")
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|wandb_v\d_[A-Za-z0-9_]{20,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,})"
)
_KEY = re.compile(
    r"(?<![\w.-])(?P<option>-+)?(?P<key>[A-Za-z_][\w.-]{0,200})(?:[\"']?\s{0,3}[=:]\s{0,3}|(?(option)\s{1,3}(?!-)|(?!)))"
)
_VALUE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?:Bearer |Basic )?[^\s,;&)\]}\"']+")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_remembered: set[str] = set()  # values of secret options, of this process


@lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Whether a key names a secret.

    Args:
        key: Name of an option, an environment variable or a field, in any spelling.

    Examples:
        >>> [is_secret(k) for k in ("hub_token", "WANDB_API_KEY", "apiKey", "AWS_ACCESS_KEY_ID", "db.password", "token")]
        [True, True, True, True, True, True]
        >>> [is_secret(k) for k in ("pad_token", "max_tokens", "tokenizer", "sort_key", "HF_TOKEN_PATH", "author")]
        [False, False, False, False, False, False]
    """
    words = [w.lower() for w in _WORDS.findall(key[:200])]
    if not words:
        return False
    pairs = set(itertools.pairwise(words))
    if ("access", "key") in pairs:  # also AWS_ACCESS_KEY_ID
        return words[-1] not in _NOT_THE_SECRET - {"id"}
    if words[-1] in _NOT_THE_SECRET:
        return False
    if _ALWAYS.intersection(words) or any(b == "key" and a in _KEYS for a, b in pairs):
        return True
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] == "token" and before not in _TOKENS) or (words[-1] in ("tokens", "keys") and before in _PLURAL)


def redact(value: Any, key: str = "") -> Any:
    """A copy of settings in which secrets are hidden and nothing else is changed.

    Args:
        value: Dictionaries, lists and plain values in any nesting.
        key: The key of the value itself, if it has one.

    Examples:
        >>> redact({"hub_token": "hf_1", "seed": 0, "server": "http://me:pw@host:1/x?sig=3", "kwargs": {"token": "a"}})
        {'hub_token': '<hidden>', 'seed': 0, 'server': 'http://<hidden>@host:1/x?sig=<hidden>', 'kwargs': {'token': '<hidden>'}}
    """
    if isinstance(value, str | bytes):
        if is_secret(key) and value:
            return HIDDEN
        return _redact_value(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        inner = key if is_secret(key) else ""
        items = cast("Mapping[object, object]", value).items()
        mapping = {redact(k) if isinstance(k, str) else k: redact(v, inner or str(k)) for k, v in items}
        return mapping if type(cast("object", value)) is dict else _like(cast("object", value), mapping)
    if isinstance(value, list | tuple | set | frozenset):
        several = cast("Collection[object]", value)
        if key == "" and _is_texts(several):
            return _redact_list(several)
        items = [redact(v, key) for v in several]
        return items if type(several) is list else _like(several, items)
    is_number = isinstance(value, int | float | complex) and not isinstance(value, bool)
    return HIDDEN if is_number and is_secret(key) else value


def redact_text(text: str) -> str:
    """A message, a traceback or a log line without the secrets in `key=value` pairs, URLs, known forms and known values.

    Args:
        text: The text.

    Examples:
        >>> redact_text("cannot push with hub_token='abc' to https://u:p@host/x")
        "cannot push with hub_token='<hidden>' to https://<hidden>@host/x"
    """
    return _hide_assigned(_redact_value(text))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without the secrets in `--hub_token X`, `--hub_token=X`, `hub.token=X` and JSON values with such keys.

    Args:
        arguments: The words of the command line.

    Examples:
        >>> redact_arguments(["train", "--hub_token", "hf_1", "--seed", "3", "--model_init_kwargs={'token': 'x'}"])
        ['train', '--hub_token', '<hidden>', '--seed', '3', "--model_init_kwargs={'token': '<hidden>'}"]
    """
    found: list[str] = []
    secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("--")
        if is_option and not equals:
            secret = is_secret(name.lstrip("-"))
            found.append(argument)
        elif equals and is_secret(name.lstrip("+-")) and " " not in name:
            found.append(f"{name}={HIDDEN}")
            secret = False
        else:
            found.append(HIDDEN if secret else redact_text(argument))
            secret = False
    return found


def hide(text: str) -> str:
    """Text in which the values of secret environment variables and options are hidden, and nothing else is changed.

    Args:
        text: The text, for example a model's sample, which must stay unchanged otherwise.
    """
    pattern = _pattern(frozenset(_values()))
    return text if pattern is None else pattern.sub(HIDDEN, text)


def hide_in(value: Any) -> Any:
    """A copy of dictionaries and lists in which `hide` is applied to all texts, keys among them.

    Args:
        value: Dictionaries, lists and plain values in any nesting.
    """
    return _hidden_in(value, _pattern(frozenset(_values())))


def _hidden_in(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """The copy of `hide_in`; the environment was read once for all texts, which may be thousands."""
    if isinstance(value, str):
        return value if pattern is None else pattern.sub(HIDDEN, value)
    if isinstance(value, dict):
        found = cast("dict[object, object]", value)
        return {_hidden_in(k, pattern): _hidden_in(v, pattern) for k, v in found.items()}
    if isinstance(value, list | tuple):
        return [_hidden_in(v, pattern) for v in cast("Iterable[object]", value)]
    return value


def remember(settings: Any) -> None:
    """Remember the secrets in these settings, so that from now on they are hidden wherever they would be written.

    Args:
        settings: Settings as in `redact`, or a command line as a list.
    """
    if _is_texts(settings):
        options = itertools.pairwise(settings)
        _collect({a.lstrip("-"): b for a, b in options if a.startswith("--") and "=" not in a})
        settings = dict(a.lstrip("+-").split("=", 1) for a in settings if "=" in a) | {"": settings}
    _collect(settings)


class HidesSecrets:
    """A base class for configurations: `to_dict` and pickles leave secrets out, and copies keep them."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration for JSON, without secrets."""
        plain = cast("dict[str, Any]", cast("Any", super()).to_dict())
        # transformers hides every key that ends so: tokens of the vocabulary, such as pad_token, and None
        real = {k: getattr(self, k) for k in plain if k.endswith("_token")}
        return redact({**plain, **real})

    def __getstate__(self) -> dict[str, Any]:
        return redact(vars(self))

    def __copy__(self: C) -> C:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self: C, memo: dict[int, Any]) -> C:
        new = object.__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(x, str) for x in cast("list[object]", value))


def _redact_list(items: list[str]) -> list[str]:
    """The texts without secrets; a list with options is read as a command line."""
    return redact_arguments(items) if any(x.startswith("--") for x in items) else [_redact_value(x) for x in items]


def _redact_value(text: str) -> str:
    """The text without the secrets in URLs, logins, known forms and known values."""
    if "://" in text:
        text = _URL.sub(_hide_in_url, text)
    if "@" in text:
        text = _LOGIN.sub(f"{HIDDEN}@", text)
    if _may_be_json(text):
        return _redact_json(text)
    return hide(_KNOWN_FORMS.sub(HIDDEN, text))


def _may_be_json(text: str) -> bool:
    return text[:1] in ("{", "[") and len(text) < 100_000


def _redact_json(text: str) -> str:
    """The text of a dictionary or list, on a command line or in an environment variable, without secrets."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return hide(_KNOWN_FORMS.sub(HIDDEN, _hide_assigned(text)))
    cleaned = redact(content)
    return text if cleaned == content else json.dumps(cleaned, ensure_ascii=False)


def _hide_in_url(match: re.Match[str]) -> str:
    rest, hash_, fragment = match["rest"].partition("#")
    place, question, query = rest.partition("?")
    host, slash, path = place.partition("/")
    if "@" in host:
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    elif "@" in path and ":" in host:  # a password with a slash in it
        host, slash, path = f"{HIDDEN}@{path.rpartition('@')[2]}", "", ""
    hidden = match["scheme"] + host + slash + path
    if question:
        parts = [p.partition("=") for p in query.split("&")]
        hidden += "?" + "&".join(f"{name}={HIDDEN}" if equals else HIDDEN for name, equals, _ in parts)
    if hash_:
        hidden += "#" + (HIDDEN if "=" in fragment else fragment)
    return hidden


def _hide_assigned(text: str) -> str:
    """The text without the values in `key=value`, `'key': 'value'` and `--key value` whose key names a secret."""
    parts: list[str] = []
    done = 0
    for match in _KEY.finditer(text):
        if match.start() < done or not is_secret(match["key"]):
            continue
        value = _VALUE.match(text, match.end())
        if value is None or value[0] in ("None", "True", "False", "null", "true", "false"):
            continue
        quotes = value[0][0] if value[0][0] in "\"'" else ""
        parts += [text[done : match.end()], f"{quotes}{HIDDEN}{quotes}"]
        done = value.end()
    return "".join(parts) + text[done:]


def _like(value: object, content: Any) -> Any:
    """The content in the class of the value; the content itself where that class cannot be made from it."""
    kind: Any = type(value)
    try:
        return kind(*content) if hasattr(value, "_fields") else kind(content)
    except TypeError:  # its constructor takes other arguments
        return content


def _collect(value: object, key: str = "") -> None:
    """Remember the secrets of settings in any nesting."""
    if isinstance(value, Mapping):
        for k, v in cast("Mapping[object, object]", value).items():
            _collect(v, key if is_secret(key) else str(k))
    elif isinstance(value, list | tuple | set | frozenset):
        for v in cast("Iterable[object]", value):
            _collect(v, key)
    elif isinstance(value, str):
        if is_secret(key):
            _remembered.update(_worth_hiding([value]))
        elif _may_be_json(value):
            with contextlib.suppress(ValueError, RecursionError):
                _collect(json.loads(value))
        _remembered.update(_worth_hiding(_in_urls(value)))


def _in_urls(text: str) -> Iterable[str]:
    """The passwords and the values of secret query parameters in the URLs of a text."""
    for match in _URL.finditer(text) if "://" in text else ():
        place, _, query = match["rest"].partition("#")[0].partition("?")
        user = place.rpartition("@")[0]
        yield user.partition(":")[2] or user
        for part in query.split("&"):
            name, _, value = part.partition("=")
            if is_secret(name):
                yield value


def _worth_hiding(values: Iterable[str]) -> set[str]:
    return {
        v for v in (x.strip() for x in values) if len(v) >= _SHORTEST and v.lower() not in _ORDINARY and HIDDEN not in v
    }


def _values() -> set[str]:
    """All values that are known to be secret now."""
    found = set(_remembered)
    for name, value in os.environ.items():
        if is_secret(name) and name != "PWD":  # PWD is a shell's working directory, not a password
            found |= _worth_hiding([value])
        if "://" in value:
            found |= _worth_hiding(_in_urls(value))
    return found


@lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    spelled = {
        form for v in values for form in (v, quote(v, safe=""), json.dumps(v)[1:-1], html.escape(v), repr(v)[1:-1])
    }
    # Longest first, because one secret may be the beginning of another.
    return re.compile("|".join(map(re.escape, sorted(spelled, key=lambda s: (-len(s), s))))) if spelled else None
