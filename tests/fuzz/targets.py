"""What is fuzzed: for each target a strategy of inputs and a check.

A check returns "refused" (a ValueError or TypeError with a message) or "fine" (and what came out keeps its promises); for
inputs that are bad by construction it must be "refused". Any other exception, or a promise that is broken, is a failure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import doctor_targets
import folders_targets
import losses_targets
import numerics_targets
import preference_targets
import rewards_targets
import trainer_targets
from arguments import (
    ANY_BATCH,
    ANY_LOGPROBS,
    BAD_BOUNDS,
    BAD_LOSS,
    BAD_OVERRIDE,
    BAD_SMALL,
    any_batch,
    any_logprobs,
    bad_bounds,
    bad_loss,
    bad_override,
    bad_small,
)
from files import (
    BAD_OPTIONS,
    BATCHES,
    COMPLETIONS,
    DATASETS,
    LOGS,
    any_completion,
    any_damage,
    any_dataset,
    any_jsonl,
    any_log,
    any_overrides,
    any_report,
    any_saved_batch,
    any_yaml,
    attacks,
    bad_options,
    json_lines,
    overrides,
    yaml_bytes,
)
from hypothesis import strategies as st


class Target(NamedTuple):
    """One thing that is fuzzed."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], str]
    bad: bool
    """Whether every input is bad, so that "fine" is a failure."""
    slow: bool = False


TARGETS: dict[str, Target] = {
    "bad arguments of bounds": Target(BAD_BOUNDS, bad_bounds, bad=True),
    "bad arguments of policy_loss": Target(BAD_LOSS, bad_loss, bad=True),
    "bad arguments of others": Target(BAD_SMALL, bad_small, bad=True),
    "bad overrides of hosts": Target(BAD_OVERRIDE, bad_override, bad=True),
    "any log-probs": Target(ANY_LOGPROBS, any_logprobs, bad=False),
    "any values behind the mask": Target(ANY_BATCH, any_batch, bad=False),
    "any YAML": Target(yaml_bytes, any_yaml, bad=False),
    "any JSONL": Target(json_lines, any_jsonl, bad=False),
    "any verl overrides": Target(overrides, any_overrides, bad=False),
    "any log": Target(LOGS, any_log, bad=False),
    "any saved batch": Target(BATCHES, any_saved_batch, bad=False),
    "any damage to a sealed folder": Target(
        st.tuples(st.binary(min_size=1, max_size=60), st.integers(0, 99), st.integers(0, 300)), any_damage, bad=True
    ),
    "any completion": Target(COMPLETIONS, any_completion, bad=False),
    "any report": Target(
        st.tuples(st.lists(attacks, min_size=1, max_size=2), attacks), any_report, bad=True, slow=True
    ),
    "any dataset": Target(DATASETS, any_dataset, bad=False, slow=True),
    "bad options of a run": Target(BAD_OPTIONS, bad_options, bad=True, slow=True),
}
ROOMS = (
    numerics_targets, losses_targets, trainer_targets, preference_targets, doctor_targets, rewards_targets, folders_targets,
)  # fmt: skip
TARGETS |= {name: Target(*entry) for room in ROOMS for name, entry in room.TARGETS.items()}
