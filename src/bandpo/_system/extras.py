"""Which extra of bandpo installs a package that is missing."""

_EXTRA_OF = {
    "matplotlib": "plot",
    **dict.fromkeys(
        ("accelerate", "datasets", "huggingface_hub", "numpy", "pandas", "pyarrow", "safetensors", "tokenizers"), "trl"
    ),
    **dict.fromkeys(("transformers", "trl", "yaml"), "trl"),
    **dict.fromkeys(
        ("gguf", "jinja2", "math_verify", "pebble", "platformdirs", "reasoning_gym", "rich", "scipy"), "lab"
    ),
}
"""The smallest extra that has a package, by the name that is imported."""
_PACKAGE_OF = {"yaml": "PyYAML", "math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
"""The packages that are installed under another name than the imported one."""


def how_to_install(error: ImportError, command: str, extra: str | None = None) -> str | None:
    """A message about an import that failed because a package of an extra is not installed.

    Args:
        error: The error.
        command: What was to run, for example "bandpo train".
        extra: The extra that has everything that the command needs. Default: the smallest one that has the package.

    Returns:
        The message, which names package and extra; None where another package is missing, or where an installed one failed.

    Examples:
        >>> how_to_install(ModuleNotFoundError("No module named 'yaml'", name="yaml"), "bandpo train", "lab")
        "bandpo train needs PyYAML, which is not installed: pip install 'bandpo[lab]'"
    """
    missing = _missing(error)
    smallest = None if missing is None else _EXTRA_OF.get(missing)
    if missing is None or smallest is None:
        return None
    if extra is None and "pip install 'bandpo[" in str(error):  # what was being done is in this message
        return None
    name = _PACKAGE_OF.get(missing, missing)
    return f"{command} needs {name}, which is not installed: pip install 'bandpo[{extra or smallest}]'"


def _missing(error: BaseException | None) -> str | None:
    """The top-level package that could not be found; an error of ours may have been raised from the one that names it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None
