"""Secrets under any key, nesting, URL and text; damage to sealed folders and checked results; writers that meet.

Each entry of `TARGETS` is (inputs, check, bad, slow): the check returns "refused" or "fine", and raises if a promise is broken.
"""

import json
import os
import tempfile
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from bandpo._system import secrets as _secrets
from bandpo._system.files import SEAL, damage, read_checked_json, seal, write_checked_json, write_json, write_text
from bandpo._system.locks import Claim, InUseError
from bandpo._system.secrets import HIDDEN, hide, redact, redact_arguments, redact_text, remember

PLACE = Path(tempfile.mkdtemp(prefix="bandpo-fuzz-folders-"))

# ---- secrets

_NAMES = (
    "token",
    "api_key",
    "password",
    "secret",
    "access_key",
    "credentials",
    "private_key",
    "passphrase",
    "authorization",
)
_OWNERS = ("", "hub_", "HF_", "wandb-", "my.", "AWS_", "client", "x_y_")
secret_keys = st.builds(
    lambda owner, name, case: case(owner + name),
    st.sampled_from(_OWNERS),
    st.sampled_from(_NAMES),
    st.sampled_from([str, str.upper, str.lower]),
).filter(_secrets.is_secret)  # "clienttoken" is one word that nobody can read
ordinary_keys = st.sampled_from(
    [
        "seed",
        "pad_token",
        "max_tokens",
        "learning_rate",
        "sort_key",
        "tokenizer",
        "objective",
        "author",
        "HF_TOKEN_PATH",
    ]
)
# An alphabet of its own, so that a secret is in no ordinary text by chance.
secrets_ = st.builds(
    lambda inner, end: f"QXZ{inner}{end}", st.text("QXZ019+/=._~-", max_size=30), st.sampled_from(["ZXQZ", "QXQX"])
)
ordinary = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("abc xyz.,:;-_/()[]{}'\"\\\n", max_size=20),
    st.sampled_from(["HuggingFaceTB/SmolLM2-135M", "https://host/data.jsonl", "git@github.com:owner/name", "0.05", "a=b", "{"]),
)  # fmt: skip
ordinary_trees = st.recursive(
    ordinary,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(ordinary_keys, x, max_size=3), st.tuples(x, x)),
    max_leaves=6,
)
wraps = st.lists(
    st.sampled_from(["list", "tuple", "dict", "json", "beside"]), max_size=4
)  # what is put around the secret, from the inside
hiding = st.sampled_from(["key", "userinfo", "user", "query", "fragment", "deep", "number"])


def _planted(kind: str, key: str, secret: str) -> Any:
    quoted = urllib.parse.quote(secret, safe="")
    return {
        "key": {key: secret}, "deep": {key: [{"x": (secret, {"y": secret})}]}, "number": {key: [secret, 12.5]},
        "userinfo": f"https://me:{quoted}@host:8/x", "user": f"s3://{quoted}@bucket/x", "query": f"http://h/x?a=1&sig={quoted}",
        "fragment": f"https://h/x#{key}={quoted}",
    }[kind]  # fmt: skip


def _wrapped(value: Any, wrap: str, other: Any) -> Any:
    if wrap == "json":
        try:
            return json.dumps({"x": value})
        except TypeError:
            return [value]
    return {
        "list": [other, value],
        "tuple": (value, other),
        "dict": {"x": value},
        "beside": {"seed": other, "y": value},
    }[wrap]


def no_secret_survives(draw: tuple[str, str, str, list[str], Any]) -> str:
    """A secret under a key or in a URL, in any nesting, JSON texts too, is not in what is written."""
    kind, key, secret, around, other = draw
    value = _planted(kind, key, secret)
    for wrap in around:
        value = _wrapped(value, wrap, other)
    found = repr(redact(value))
    quoted = urllib.parse.quote(secret, safe="")
    assert secret not in found and quoted not in found, found
    assert HIDDEN in found
    return "refused"


def ordinary_values_stay(tree: Any) -> str:
    """What is no secret is not changed, nor its kind."""
    assert repr(redact(tree)) == repr(tree)
    return "fine"


texts = st.text("abc xyz.,:;-_/()[]{}\\\n\t&#", max_size=25)


def no_secret_in_text(draw: tuple[str, str, str, str, str]) -> str:
    """Messages, tracebacks and command lines: `key=value`, `--key value`, `'key': 'value'`, and values known from options."""
    before, after, key, secret, form = draw
    in_url = urllib.parse.quote(secret, safe="")
    text = {
        "option": f"{before} --{key} {secret} {after}", "equals": f"{before} {key}={secret} {after}",
        "repr": f"{before} {{'{key}': '{secret}', 'seed': 1}} {after}", "json": f'{before} {{"{key}": "{secret}"}} {after}',
        "call": f"{before} Config({key}={secret!r}, seed=1) {after}", "url": f"{before} http://u:{in_url}@h/x {after}",
    }[form]  # fmt: skip
    found = redact_text(text)
    assert secret not in found and in_url not in found, (text, found)
    assert secret not in " ".join(redact_arguments(["train", f"--{key}", secret, f"--{key}={secret}", "--seed", "1"]))
    _secrets._remembered.clear()
    remember({key: secret})
    try:
        sample = f"{before}{secret}{after}{secret}"
        assert hide(sample) == f"{before}{HIDDEN}{after}{HIDDEN}"
        path = PLACE / f"{os.getpid()}.json"
        write_json(path, {"x": [sample], secret: 1})
        assert secret not in path.read_text()
    finally:
        _secrets._remembered.clear()
    return "refused"


def any_text_is_read_in_linear_time(text: str) -> str:
    """Redaction ends, whatever stands there, and `hide` takes known values only."""
    redact_text(text * 50)
    assert hide(text) == text
    return "fine"


# ---- damage


def _changed(data: bytes, place: int, value: int) -> bytes:
    place %= len(data)
    if value < 256 and data[place] != value:
        return data[:place] + bytes([value]) + data[place + 1 :]
    return data[:place]


def damage_is_seen(draw: tuple[bytes, bool, int, int]) -> str:
    """One byte of a file or of the seal itself is changed, or the file is cut: the folder is not taken for whole."""
    content, in_seal, place, value = draw
    folder = PLACE / f"sealed-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / SEAL).unlink(missing_ok=True)
    (folder / "data").write_bytes(content)
    seal(folder)
    assert damage(folder) is None
    path = folder / (SEAL if in_seal else "data")
    before = path.read_bytes()
    path.write_bytes(_changed(before, place, value))
    if in_seal:  # white space, and the digits of nothing else, may change without a change of what it says
        try:
            same = json.loads(path.read_bytes()) == json.loads(before)
        except (ValueError, RecursionError):
            same = False
        if same:
            return "refused"
    assert damage(folder) is not None
    return "refused"


def results_are_read_as_written_or_refused(draw: tuple[Any, int, int]) -> str:
    """A result of a comparison that was changed or cut is read as it was, or refused; never as another one."""
    tree, place, value = draw
    content = {"config": {"a": 1}, "result": tree, "seconds": 1.5}
    path = PLACE / f"{os.getpid()}-result.json"
    write_checked_json(path, content)
    before = json.loads(json.dumps(content))
    assert repr(read_checked_json(path)) == repr(before)
    path.write_bytes(_changed(path.read_bytes(), place, value))
    try:
        found = read_checked_json(path)
    except ValueError:
        return "refused"
    kept = {k: found.get(k) for k in before}  # a damaged name of the checksum leaves a key too many
    assert repr(kept) == repr(before)
    return "fine"


# ---- writers that meet


def writers_do_not_meet(draw: tuple[list[str], int]) -> str:
    """Threads that write one file and claim one folder: each text is whole, one is inside at a time, nothing is left."""
    contents, rounds = draw
    folder = PLACE / f"meeting-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    path, inside, wrong = folder / "file", [0], []

    def write(text: str) -> None:
        try:
            for _ in range(rounds):
                write_text(path, text)
                if path.read_text() not in contents:
                    wrong.append("a file that nobody wrote")
                try:
                    claim = Claim(folder / "claimed")
                except InUseError:
                    continue
                inside[0] += 1
                if inside[0] != 1:
                    wrong.append("two inside")
                inside[0] -= 1
                claim.release()
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert not wrong, wrong
    path.unlink()
    assert [p for p in folder.rglob("*") if p.is_file()] == []
    return "fine"


SECRETS = st.tuples(hiding, secret_keys, secrets_, wraps, ordinary)
TEXTS = st.tuples(
    texts, texts, secret_keys, secrets_, st.sampled_from(["option", "equals", "repr", "json", "call", "url"])
)
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str], bool, bool]] = {
    "secrets in settings": (SECRETS, no_secret_survives, True, False),
    "secrets in texts": (TEXTS, no_secret_in_text, True, False),
    "ordinary settings": (ordinary_trees, ordinary_values_stay, False, False),
    "any text for redaction": (st.text(max_size=60), any_text_is_read_in_linear_time, False, False),
    "damage to a folder or its seal": (
        st.tuples(st.binary(min_size=1, max_size=60), st.booleans(), st.integers(0, 200), st.integers(0, 300)),
        damage_is_seen, True, False,
    ),
    "damage to results": (
        st.tuples(ordinary_trees, st.integers(0, 400), st.integers(0, 300)), results_are_read_as_written_or_refused, False,
        False,
    ),
    "writers that meet": (
        st.tuples(st.lists(st.text("abc", min_size=1, max_size=2000), min_size=2, max_size=4, unique=True), st.integers(1, 5)),
        writers_do_not_meet, False, True,
    ),
}  # fmt: skip
