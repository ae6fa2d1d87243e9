"""What the completion of the shell knows of `bandpo train` and of names; from tables, without torch."""

import argparse

from bandpo._system.completion import Known
from bandpo.toy.tasks import TASKS
from bandpo.train.config import CHOICES, MATH, METHODS, PRESETS
from bandpo.train.options import declared_in, packaged_table

_FILES = (
    *("config", "model", "dataset", "eval_dataset", "pairs", "paths", "output_dir", "resume_from_checkpoint"),
    *("deepspeed", "fsdp_config"),
)


def known_values() -> Known:
    """What is known of the values of options in all commands."""
    objectives = packaged_table()["objectives"]
    words = {
        "method": list(METHODS),
        "task": list(TASKS),
        "objective": list(dict.fromkeys([*objectives["grpo"], *objectives["preference"]])),
        "objectives": objectives["grpo"],
        "names": objectives["grpo"],
        "reward": sorted(MATH),
        "report_to": ["none", "tensorboard", "trackio", "wandb"],
        **CHOICES,
    }
    return Known(words, _FILES, ("objectives",))


def actions_of_train() -> list[argparse.Action]:
    """The options of `bandpo train` for all methods, each in the spelling of the files."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", help="YAML file with options")
    parser.add_argument("--preset", choices=list(PRESETS), help="a job of bandpo instead of a file")
    found: dict[str, argparse.Action] = {action.option_strings[0]: action for action in parser._actions}
    table = packaged_table()
    truths = {row["name"] for rows in (table["grpo"], table["preference"]) for row in rows if row.get("type") == "bool"}
    for method in ("grpo", "dpo"):
        for action in declared_in(table, method).parser._actions:
            if action.dest in truths and action.nargs != 0:
                action.choices = ["true", "false"]
            of_files = {o.replace("_", "-") for o in action.option_strings if "_" in o}
            action.option_strings = [o for o in action.option_strings if o not in of_files]
            found.setdefault(action.option_strings[0], action)
    return list(found.values())
