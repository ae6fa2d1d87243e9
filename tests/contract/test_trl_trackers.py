"""What reaches TensorBoard and other trackers by transformers' own callback: numbers, and never None.

With tensorboard installed its writer writes the files, and its reader reads them. Without it, a recorder takes the writer's
place behind transformers' callback.
"""

import importlib.util
import logging
import math
import sys
from types import ModuleType

import pytest
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from trl_runs import reward, settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of",
    "ignore:.*distutils:DeprecationWarning", "ignore:.*google:DeprecationWarning",
)  # fmt: skip

REAL = importlib.util.find_spec("tensorboard") is not None


class Recorder:
    """Stands in for a SummaryWriter."""

    written: dict[str, list[float]]
    texts: list[str]

    def __init__(self, log_dir):
        type(self).written, type(self).texts = {}, []

    def add_scalar(self, name, value, step):
        self.written.setdefault(name, []).append(value)

    def add_text(self, name, text, step=None):
        self.texts.append(name)

    def flush(self):
        pass

    close = flush


class Seen(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


@pytest.fixture
def scalars(monkeypatch, tmp_path):
    """A function that reads what was written, by name; transformers finds a tracker named "tensorboard" in any case."""
    folder = tmp_path / "tensorboard"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    if not REAL:
        module = ModuleType("tensorboardX")
        module.SummaryWriter = Recorder
        monkeypatch.setitem(sys.modules, "tensorboardX", module)
        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)

    def read():
        if not REAL:
            return Recorder.written
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return read


def never(completions, **_):
    """A reward function that scores nothing, so that the mean of its rewards is over no number."""
    return [None] * len(completions)


@pytest.mark.parametrize("objective", ["bandpo-kl", "cispo", "gspo"])
def test_no_value_of_a_run_or_an_evaluation_is_none(
    objective, scalars, make_model, tokenizer, prompts, tmp_path, caplog
):
    seen = Seen()
    args = settings(
        tmp_path / "run", objective=objective, report_to="tensorboard", max_completion_length=2, learning_rate=1e-4,
        full_metrics_every=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=[reward, never], args=BandGRPOConfig(**args), train_dataset=prompts,
        eval_dataset=Dataset.from_list(list(prompts)[:2]), processing_class=tokenizer, callbacks=[seen],
    )  # fmt: skip
    # transformers does not hand its messages on to the root logger
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        trainer.train()
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "attempting to log a value" not in caplog.text
    assert [name for row in seen.rows for name, value in row.items() if value is None] == []
    written = scalars()
    assert {"train/loss", "train/reward", "train/clip_ratio/region_mean", "eval/reward"} <= set(written)
    # The case is real: a line without the full metrics, a function that scored nothing, and a bin of p without a token.
    assert not any("never" in name for name in written)
    assert "train/clip_fraction_by_prob/any/<1e-4" not in written
    assert len(written["train/loss"]) == 4 and len(written["train/token_fraction_by_prob/<1e-4"]) == 2
    assert all(math.isfinite(x) for name, values in written.items() for x in values)
