"""The entries of the rules that measure a batch, a model, or several metrics of a log."""

from bandpo.doctor.catalog import Rule

RULES = (
    Rule(
        name="noise",
        reads=("batch",),
        sees="|log r| between two scorings of the same tokens by the same weights, in bins of p: of the columns logprobs and "
        "again_logprobs, or of a model (--model FOLDER) with other batches, padding and dtype. Beside it, half the width of "
        "the region in log r over the 0.99 quantile of the noise, and the share of tokens that the noise alone puts outside.",
        why="A region that is narrower than the rounding of log-probs clips tokens that no update has moved.",
        healthy="Half the width is at least 3 times the noise; below 1 it is a problem.",
        source="the limits are our judgement; that 16-bit rounding separates sampler and trainer is measured in "
        "arXiv:2510.26788",
        knobs={
            "TRL": "log-probs in float32 (cast_lm_head_to_fp32=True), a larger radius or epsilon",
            "bandpo train": "bf16: false, or a larger radius",
            "verl": "actor_rollout_ref.actor.fsdp_config.dtype=float16 and rollout.dtype=float16, or a larger radius",
        },
    ),
    Rule(
        name="kept mass",
        reads=("batch",),
        sees="The mass of the next-token distribution that top-k, top-p and min-p keep: from stored logits, from log-probs of "
        "the likeliest tokens (old_topk_logprobs), or from a model.",
        why="The sampler draws from p/Z, where Z is the kept mass. Where the log-prob of the whole distribution is taken for "
        "the sampler's, log r is too large by -log Z, which a narrow upper edge takes for a move.",
        healthy="-log Z of at most 0.01 nats on average; 0 without truncation.",
        source="the formula by definition of the renormalised distribution; the limit is our judgement",
        knobs={
            "TRL": "top_p=1.0, top_k=0, min_p unset",
            "bandpo train": "top_p=1.0, top_k=0, min_p unset",
            "verl": "actor_rollout_ref.rollout.top_p=1.0 and top_k=-1",
        },
    ),
    Rule(
        name="effective size",
        reads=("batch", "log"),
        sees="Kish's effective sample size (Σw)²/Σw² over the number of weights w = π/π_old, and π/μ where the sampler's "
        "log-probs are stored: of tokens, and of sequences with the product of their ratios. Of a log, that metric.",
        why="It is the share of the samples that an estimate with these weights makes use of. It is small where a few ratios "
        "have most of the weight.",
        healthy="At least half of the tokens. Products over long sequences are often far less, which matters for objectives "
        "that weigh by them.",
        source="a half is the usual limit for resampling in sequential Monte Carlo (Doucet and Johansen, A tutorial on "
        "particle filtering and smoothing, 2009)",
        knobs={
            "TRL": "fewer num_iterations, a smaller learning_rate; vllm_importance_sampling_correction=True",
            "bandpo train": "fewer steps_per_generation, a smaller learning_rate",
            "verl": "fewer ppo_epochs, a smaller lr; algorithm.rollout_correction.rollout_is=token",
        },
    ),
    Rule(
        name="age",
        reads=("batch", "log"),
        sees="How many updates lie between the policy that sampled a token and the newest one, from a column of ages or of "
        "policy versions: the share of each age, its mean |log r|, and what part of it is outside of the region. Of a log, the "
        "mean age that SkyRL and prime-rl write.",
        why="Old samples are far from the policy, so a region takes away more of their gradient.",
        healthy="A mean age of at most 8 updates.",
        source="our judgement; AReaL (arXiv:2505.24298) studies limits of the age up to such numbers",
        knobs={
            "AReaL": "max_head_offpolicyness",
            "prime-rl": "max_off_policy_steps",
            "SkyRL": "trainer.fully_async.max_staleness_steps",
            "verl": "async_training.staleness_threshold",
        },
    ),
    Rule(
        name="gradient",
        reads=("batch",),
        sees="Who pays: |dJ/dlog π| of each token, by automatic differentiation of the run's own objective (grpo and bandpo-kl "
        "where that is not known), by bins of p and by the sign of the advantage, and what the region takes away from r·A.",
        why="A region is two treatments. Its upper edge acts on tokens with A > 0, its lower edge on those with A < 0, and a "
        "band opens both for rare tokens. Which half acts decides where the entropy and pass@k go.",
        healthy="A region takes away at most half of the gradient of either half.",
        source="our judgement; what each half does is measured in docs/evidence.md",
        knobs={
            "TRL": "epsilon for A < 0, epsilon_high for A > 0; radius of the objective",
            "bandpo train": "radius, or an objective with one half of the band",
            "verl": "clip_ratio_low, clip_ratio_high; the radius",
        },
    ),
    Rule(
        name="duplicates",
        reads=("batch",),
        sees="Completions that equal another one of their group token by token, from completion_ids and group.",
        why="Equal completions have equal rewards: they add nothing to the comparison of a group.",
        healthy="At most a quarter of the completions repeat another one.",
        source="our judgement; short answers repeat more often",
        knobs={
            "TRL": "temperature=1.0, top_p=1.0",
            "bandpo train": "temperature=1.0, top_p=1.0",
            "verl": "actor_rollout_ref.rollout.temperature=1.0, top_p=1.0",
        },
    ),
    Rule(
        name="length bias",
        reads=("batch",),
        sees="The share of the gradient mass |A|·r that the longest quarter of the sequences has with token-mean and with "
        "seq-mean-token-mean, and the correlation of advantage and length.",
        why="token-mean weighs a sequence by its length. seq-mean-token-mean divides by it, so that long wrong answers cost "
        "less for each token, and grow.",
        healthy="No range: the rule shows what a choice of the aggregation means for this batch.",
        source="Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476",
        knobs={
            "TRL": "loss_type=dr_grpo or dapo",
            "bandpo train": "aggregation of the objective",
            "verl": "actor_rollout_ref.actor.loss_agg_mode",
        },
    ),
    Rule(
        name="kl estimate",
        reads=("batch",),
        sees="k1, k2, k3 and r·k3 over the tokens with log-probs of a reference: mean, standard error of independent tokens, "
        "standard deviation, and what the gradient of each descends.",
        why="All have a similar value and different gradients. k3 grows without a bound where the reference likes a token "
        "much more than the policy does, so few tokens may decide it.",
        healthy="The largest token has at most a tenth of r·k3 (told from 100 tokens on).",
        source="our judgement; gradients by docs/kl.md",
        knobs={
            "TRL": "kl=k3-ratio; in a plain GRPOConfig use_bias_correction_kl=True",
            "bandpo train": "kl=k3-ratio",
            "verl": "actor_rollout_ref.actor.kl_loss_type=low_var_kl+",
        },
    ),
    Rule(
        name="entropy cause",
        reads=("log",),
        sees="The course of the entropy beside the shares of tokens clipped below and above, where it changed by more than a "
        "quarter.",
        why="An upper edge keeps rare tokens with A > 0 from rising and lowers the entropy; a lower edge keeps those with "
        "A < 0 from falling and raises it. If the other side clips, the clip is not the cause.",
        healthy="The side that clips is not the one that drives the entropy; a side counts from twice the share of the other.",
        source="arXiv:2509.26114 for the direction; the limits are our judgement",
        knobs={
            "TRL": "epsilon_high=0.28 against a fall; a smaller epsilon_high against a rise",
            "bandpo train": "the upper half of a band or dapo against a fall",
            "verl": "clip_ratio_high=0.28 against a fall; a smaller clip_ratio_high against a rise",
        },
    ),
    Rule(
        name="columns",
        reads=("batch",),
        sees="Further columns of a batch that do not fit to its log-probs.",
        why="A measure that needs such a column is left out.",
        healthy="None.",
        source="by definition",
        knobs={},
    ),
)
"""The entries, in the order of the findings."""
