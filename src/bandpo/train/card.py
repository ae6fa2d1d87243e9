"""The card (README.md) of a run and of its model: TRL's, with what this run did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bandpo._system.errors import printable
from bandpo._system.files import write_text
from bandpo._system.secrets import redact_text
from bandpo.train.record import shown_scores

_OWN = "---\nlibrary_name: transformers\ntags:\n- bandpo\n---\n\n# Model Card for {name}\n\n## Citations\n"
"""The card of a run for which TRL writes none."""
_BEFORE = "### Framework versions"
_BASELESS = "[None](https://huggingface.co/None)"
"""What TRL writes as the base of a model that is no repository of the Hub."""
_NAMELESS = 'model="None"'
"""What TRL writes as the name of a model that is not pushed to the Hub."""


def write_card(
    folder: Path,
    trainer: Any,
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    lines: Sequence[str],
) -> None:
    """Write the card of a run into its folder, and into that of its model before the model is saved.

    PEFT, which saves an adapter, adds its own facts to a card that is there, and writes an empty one otherwise.

    Args:
        folder: Folder of the run; its model will be in model/.
        trainer: The trainer of TRL, which writes its own card; None where there is none.
        facts: What the run was, for a table; "model" is the model that it began with.
        evaluation: Content of evaluation.json.
        lines: Further lines, for example settings that were changed at a resume.
    """
    card = folder / "README.md"
    if trainer is None:
        text = _OWN.format(name=folder.name)
    else:
        trainer.create_model_card(model_name=folder.name)
        text = card.read_text(encoding="utf-8").replace(_BASELESS, f"`{printable(str(facts['model']))}`")
        text = text.replace(_NAMELESS, f'model="{folder / "model"}"')
    mark = _BEFORE if _BEFORE in text else "## Citations"
    text = text.replace(mark, f"{redact_text(_section(facts, evaluation, lines))}\n{mark}", 1)
    write_text(card, text)
    (folder / "model").mkdir(exist_ok=True)
    write_text(folder / "model" / "README.md", text)


def _section(facts: Mapping[str, Any], evaluation: Mapping[str, Any], lines: Sequence[str]) -> str:
    own = [f"| {name} | {printable(str(value)).replace('|', '∣')} |" for name, value in facts.items()]
    before, after = evaluation["before"], evaluation["after"]
    scores = [f"| {name} | {before[name]:.3f} | {after[name]:.3f} |" for name in shown_scores(before, after)]
    head = f"| {evaluation['prompts']} held-out prompts | before | after |"
    more = [f"\n{printable(line)}." for line in lines]
    return "\n".join(["### This run", "", "| | |", "|---|---|", *own, *more, "", head, "|---|---|---|", *scores, ""])
