"""Data of the paper's runs as verl's parquet files: DAPO-Math and MATH levels 3-5 to train, AIME 2024, AIME 2025 and AMC 2023.

python recipes/verl/prepare_data.py --output ~/data/bandpo    # needs the Hugging Face hub, `datasets` and `pandas`

Training prompts that equal an evaluation prompt after removing white space are left out. The paper's own training file is a
modified one that is not public; this is made from the public sources and so not the same rows.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

INSTRUCTION = "\n\nReason step by step. End with one line of the form 'Answer: ' followed by the final answer alone."
TRAIN = {
    "dapo": ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
}
EVALUATION = {
    "aime_2024": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime_2025": ("math-ai/aime25", None, "test"),
    "aime_amc2023": ("math-ai/amc23", None, "test"),
}
QUESTION = ("prompt", "problem", "question")
ANSWER = ("answer", "solution")
Row = dict[str, Any]


def convert(row: Row, source: str, index: int, split: str) -> Row | None:
    """A row of a source as verl's, None where it is left out (MATH below level 3, no answer).

    Args:
        row: The row.
        source: Name of the source, by which verl chooses the reward of evaluation rows.
        index: Number of the row in its source.
        split: "train" or "test".
    """
    level = re.search(r"\d", str(row.get("level", "")))
    if level and int(level.group()) < 3:
        return None
    question, answer = first(row, QUESTION), str(first(row, ANSWER))
    if "\\boxed" in answer:
        answer = boxed(answer)
    if not answer.strip():
        return None
    return {
        "data_source": "math_dapo" if split == "train" else source,
        "prompt": [{"role": "user", "content": question.strip() + INSTRUCTION}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer.strip()},
        "extra_info": {"index": index, "split": split, "source": source},
    }


def first(row: Row, names: Sequence[str]) -> str:
    """The first of the columns that the row has.

    Args:
        row: The row.
        names: Names of columns.

    Raises:
        KeyError: If the row has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"none of the columns {', '.join(names)} is in {', '.join(row)}; has the dataset changed?")


def boxed(solution: str) -> str:
    r"""The content of the last \boxed{...} of a solution; empty if its braces do not close.

    Args:
        solution: A solution with at least one such box.
    """
    start = solution.rindex("\\boxed") + len("\\boxed")
    depth = 0
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start + 1 : end]
    return ""


def key(row: Row) -> str:
    """A prompt without white space, to find what both sides have.

    Args:
        row: A row of verl.
    """
    return re.sub(r"\s", "", row["prompt"][0]["content"])


def rows_of(path: str, config: str | None, split: str) -> Sequence[Row]:
    """The rows of a dataset of the Hugging Face hub.

    Args:
        path: Name of the dataset.
        config: Name of its configuration; None for the only one.
        split: Name of the split.
    """
    import datasets

    return cast("Any", datasets).load_dataset(path, config, split=split)


def main() -> None:
    """Download, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path.home() / "data" / "bandpo", help="folder (default: %(default)s)"
    )
    folder = parser.parse_args().output
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    held_out: set[str] = set()
    for name, (path, config, split) in EVALUATION.items():
        rows = [r for i, row in enumerate(rows_of(path, config, split)) if (r := convert(row, name, i, "test"))]
        held_out |= {key(r) for r in rows}
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
        print(f"{name}: {len(rows)} problems from {path}")
    train: dict[str, Row] = {}
    for name, (path, config, split) in TRAIN.items():
        rows = [convert(row, name, i, "train") for i, row in enumerate(rows_of(path, config, split))]
        train |= {key(r): r for r in rows if r is not None and key(r) not in held_out}
        print(f"{name}: {sum(r is not None for r in rows)} of {len(rows)} problems from {path}")
    pd.DataFrame(list(train.values())).to_parquet(folder / "train.parquet")
    print(f"train.parquet: {len(train)} problems, none of them in the evaluation")


if __name__ == "__main__":
    main()
