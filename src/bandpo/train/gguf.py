"""GGUF files, the format of llama.cpp: each becomes a folder of transformers in the cache, with dequantised weights."""

import hashlib
import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers

from bandpo._system.cache import cache_root, is_usable, sole_maker, store
from bandpo._system.errors import printable
from bandpo._system.files import write_json

Say = Callable[[str], object]

_MAGIC = b"GGUF"
_FORMAT = 1  # part of the cache's key: raise it when the same file gives another folder
_CHUNK = 1 << 22  # bytes that are read at a time for a checksum
_LICENSES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
"""Names of files beside a GGUF file that go into the folder of the model."""
_READ = (
    *(
        "*config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab*",
        "merges*",
    ),
    *("*.model", "adapter_model*", "additional_chat_templates/*.jinja"),
)
"""Names of files beside a GGUF file that transformers reads or may read, some of them in place of what is in that file."""


def is_gguf(name: str) -> bool:
    """Whether a model is given as a GGUF file: by the ending of its name, or by the first bytes of the file.

    Args:
        name: Hub name, folder or file of a model.
    """
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def folder_of(file: Path, say: Say) -> Path:
    """The folder with the dequantised model of a GGUF file; it is made if the cache does not have it undamaged.

    The folder holds the model in float32, its tokenizer with the chat template, its generation config, the license files that
    lie beside the GGUF file, and gguf.json, which says where the weights come from. float32 holds every dequantised weight as
    transformers computes it. The place in the cache is decided by the name and the content of the file, and by the files beside
    it that change the result: those of a tokenizer or a configuration, which transformers reads, and the licenses.

    Args:
        file: The GGUF file.
        say: Called with messages.

    Returns:
        The folder, in the user's cache directory or `$BANDPO_CACHE`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package gguf is missing.
        ValueError: If it is no GGUF file, is damaged, or has an architecture that transformers cannot read.
        RunError: If the cache cannot be written.
    """
    check(file)
    return converted(file.stem, checksum(file), lambda _: file, say, beside=_beside(file))


def known_folder(file: Path) -> Path | None:
    """The folder that `folder_of` has made for a GGUF file; None where it would have to be made.

    Args:
        file: The GGUF file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no GGUF file.
    """
    check(file)
    return known(file.stem, checksum(file), beside=_beside(file))


def known(name: str, content: str, *, beside: Mapping[str, str] | None = None) -> Path | None:
    """The folder that `converted` has made; None where it would have to be made.

    Args:
        name: Name of the model.
        content: SHA-256 of the GGUF file, in hexadecimal digits.
        beside: SHA-256 by name of the files that lie beside the GGUF file and change the result.
    """
    path = _place(name, content, beside)
    return path if is_usable(path, lambda _: None) else None


def _place(name: str, content: str, beside: Mapping[str, str] | None) -> Path:
    others = "" if not beside else f"-{hashlib.sha256(repr(sorted(beside.items())).encode()).hexdigest()[:16]}"
    return cache_root() / "gguf" / f"{name}-{content[:16]}{others}-{_FORMAT}"


def converted(
    name: str, content: str, obtain: Callable[[Path], Path], say: Say, *, beside: Mapping[str, str] | None = None
) -> Path:
    """The folder of a model whose GGUF file may have to be fetched first.

    Args:
        name: Name of the model, which the folder's name begins with.
        content: SHA-256 of the GGUF file, in hexadecimal digits.
        obtain: Gives the GGUF file; called with an empty folder, which is removed afterwards, and only if the cache lacks the
            model.
        say: Called with messages.
        beside: SHA-256 by name of the files that lie beside the GGUF file and change the result. None where `content` is
            enough, because they come with it.

    Returns:
        The folder.

    Raises:
        ImportError: If the package gguf is missing.
        ValueError: If it is no GGUF file, is damaged, or has an architecture that transformers cannot read.
        RunError: If the cache cannot be written.
    """
    path = _place(name, content, beside)
    if is_usable(path, say):
        say(f"the dequantised model of {name} is in {path}")
        return path
    _require_package(name)
    with sole_maker(path, say), TemporaryDirectory(prefix="bandpo-gguf-") as place:
        if is_usable(path, lambda _: None):  # another process has just made it
            return path
        file = obtain(Path(place))
        check(file)
        kinds = _quantisations(file)
        say(
            f"{file.name}: tensors of {_listed(kinds)} are dequantised to float32, once; the model is kept in {path}. It has "
            "the values of the quantised copy, not those of the model before quantisation"
        )
        model, tokenizer = _load(file)
        about = {"file": file.name, "sha256": content, "tensors": kinds, "transformers": transformers.__version__}
        about |= {"beside": dict(beside)} if beside else {}

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for license_file in _matching(file, _LICENSES):
                shutil.copyfile(license_file, folder / license_file.name)
            write_json(folder / "gguf.json", about)

        store(path, save)
    return path


def check(file: Path) -> None:
    """Check that a file is there and begins as a GGUF file does.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it begins otherwise.
    """
    if not file.is_file():
        raise FileNotFoundError(f"model {str(file)!r}: no such file")
    with file.open("rb") as opened:
        start = opened.read(len(_MAGIC))
    if start != _MAGIC:
        raise ValueError(
            f"model {str(file)!r} is no GGUF file: it begins with {start!r} instead of {_MAGIC!r}; give a GGUF file, or a "
            "folder or Hub name of a causal LM"
        )


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Args:
        file: The file.
    """
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _matching(file: Path, forms: Iterable[str]) -> list[Path]:
    """The files beside a GGUF file whose names match one of the forms; no other GGUF file."""
    found = {p for form in forms for p in file.parent.glob(form) if p.is_file() and p.suffix.lower() != ".gguf"}
    return sorted(found - {file})


def _beside(file: Path) -> dict[str, str]:
    """SHA-256 by name of the files beside a GGUF file that change its folder."""
    found = _matching(file, (*_READ, *_LICENSES))
    return {path.relative_to(file.parent).as_posix(): checksum(path) for path in found}


def _require_package(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"model {name!r} is a GGUF file, which needs a package: pip install 'bandpo[gguf]'")


def _quantisations(file: Path) -> dict[str, int]:
    """The number of tensors of each type, as llama.cpp names the types; the most frequent one first."""
    from gguf import GGUFReader  # only GGUF files need the package

    try:
        tensors = cast("list[Any]", GGUFReader(file).tensors)
        return dict(Counter(str(tensor.tensor_type.name) for tensor in tensors).most_common())
    except Exception as error:  # damage shows in many ways: an index, a size, a name that is no text
        raise ValueError(f"model {str(file)!r} is damaged: {_shown(error)}") from error


def _listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items())


def _load(file: Path) -> tuple[Any, Any]:
    """The model in float32, without a trace of its quantisation, and the tokenizer."""
    place, options = str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer: Any = cast("Any", transformers.AutoTokenizer).from_pretrained(place, **options)
        with _no_bar():
            loaded: Any = cast("Any", transformers.AutoModelForCausalLM).from_pretrained(
                place, dtype=torch.float32, **options
            )
    except Exception as error:  # transformers raises errors of many classes for what it does not know
        raise ValueError(
            f"model {str(file)!r}: transformers {transformers.__version__} cannot read this GGUF file, of architecture "
            f"{_architecture(file)!r}: {_shown(error)}"
        ) from error
    return _clean(loaded), tokenizer


@contextmanager
def _no_bar() -> Generator[None]:
    """Without transformers' bar for dequantised tensors, which its own switch for bars leaves on; `converted` has said it."""
    from transformers import modeling_gguf_pytorch_utils as module

    bar = getattr(module, "tqdm", None)
    if bar is None:  # another version of transformers
        yield
        return
    setattr(module, "tqdm", _silent)  # noqa: B010 - transformers declares no such name
    try:
        yield
    finally:
        setattr(module, "tqdm", bar)  # noqa: B010


def _silent(tensors: Iterable[Any], **options: object) -> Iterable[Any]:
    """What is iterated over, in place of a bar."""
    del options
    return tensors


def _clean(loaded: Any) -> Any:
    """The same weights in a model that transformers saves: it refuses to save what it loaded from a quantised file."""
    settings = {k: v for k, v in cast("dict[str, Any]", loaded.config.to_dict()).items() if k != "quantization_config"}
    config = cast("Any", type(loaded.config)).from_dict(settings)
    with torch.device("meta"):  # the weights are assigned, so that none is made twice
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _architecture(file: Path) -> str:
    """What the file says about the architecture of the model, empty where it says nothing."""
    from gguf import GGUFReader

    field: Any = GGUFReader(file).get_field("general.architecture")
    return "" if field is None else bytes(field.parts[field.data[0]]).decode("utf-8", "replace")


def _shown(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")[:300]
