"""The entries of the rules about how a log or a batch was read."""

from bandpo.doctor.catalog import Rule

RULES = (
    Rule(
        name="log",
        reads=("log",),
        sees="What happened while the log was read: a last row that is not finished, steps that go back, several files or "
        "runs, lines that were left out.",
        why="A run that was resumed writes some steps twice, and one that still runs ends in the middle of a row. The rules "
        "look at each metric by step; of values for the same step the later part of the log counts.",
        healthy="Steps that rise, in one file with one run.",
        source="by definition",
        knobs={"all": "--run NAME chooses a run of several; --one-run reads several files as parts of one run"},
    ),
    Rule(
        name="columns",
        reads=("log", "batch"),
        sees="Which columns of the file were understood, as what, and how many were not.",
        why="A rule can only judge what the file has under a name of the table. Names with another meaning, such as verl's "
        "response_length/clip_ratio, are not taken for it.",
        healthy="The metrics that decide: entropy, clip fraction, norm of the gradient, rewards, and the difference between "
        "sampler and trainer.",
        source="the names were read in the public source of each host, see bandpo.integrations.names",
        knobs={
            "TRL": "report_to, or the checkpoints' trainer_state.json",
            "bandpo train": "metrics.jsonl has all of them",
            "verl": "trainer.logger=[console,file]; actor_rollout_ref.rollout.calculate_log_probs=True for the sampler",
        },
    ),
)
