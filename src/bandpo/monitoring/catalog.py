"""The doctor's rules: what each looks at, why it matters, the healthy range, and what to set in each host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reads = Literal["configuration", "log", "batch"]
CameOut = Literal["holds", "in part", "mixed", "opposite", "no difference", "open"]


@dataclass(frozen=True)
class Rule:
    """A rule of the doctor, for `--explain` and for its page.

    Args:
        name: The stable name, as in `Finding.rule`.
        reads: What the rule looks at.
        sees: What is looked at, in one sentence.
        why: Why it matters, in one or two sentences.
        healthy: The healthy range, with its units.
        source: Where that range comes from: a paper with its number, or "our judgement".
        knobs: What to set, for each host that has a knob for it.
        rests_on: Claims of the evidence's protocol that the advice rests on, by id, and how they came out where they were
            measured, which is `holds` (in all places), `in part` (in some, the opposite in none), `mixed` (in some, the
            opposite in others), `opposite` (in none, the opposite in some), `no difference` (shown in all to be too small to
            matter) or `open` (neither is seen). A test compares this with docs/evidence.json.
    """

    name: str
    reads: tuple[Reads, ...]
    sees: str
    why: str
    healthy: str
    source: str
    knobs: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    rests_on: Mapping[str, CameOut] = field(default_factory=dict[str, CameOut], hash=False)


_CONFIGURATION = (
    Rule(
        name="bypass",
        reads=("configuration",),
        sees="Whose loss runs: bandpo's, the host's own, or a patch (unsloth, an early Liger) in its place.",
        why="A loss that is replaced without a word makes every other setting of the trust region void.",
        healthy="The loss that the configuration names is the one that runs.",
        source="by definition",
        knobs={
            "TRL": "BandGRPOTrainer and BandGRPOConfig with objective=...; no patch of GRPOTrainer, and TRL 1.16 or later "
            "with use_liger_kernel",
            "verl": "actor_rollout_ref.actor.policy_loss.loss_mode=bandpo",
        },
    ),
    Rule(
        name="refused",
        reads=("configuration",),
        sees="Settings for which bandpo's adapter would raise an error in the host's workers.",
        why="The error would otherwise come after the models are loaded and the first rollout is made.",
        healthy="None.",
        source="by definition: the rule runs the adapter's own check",
        knobs={"verl": "what the error says; the options of docs/verl.md"},
    ),
    Rule(
        name="inert",
        reads=("configuration",),
        sees="How many optimiser steps each rollout is used for.",
        why="At the first step on a rollout no ratio differs from 1, so a trust region can act only from the second step on. "
        "With one step for each rollout all objectives that differ only in their region are the same.",
        healthy="2 or more; or ratios that are taken against a sampler that differs from the trainer.",
        source="by definition of the ratio (PPO, arXiv:1707.06347, eq. 7)",
        knobs={
            "TRL": "num_iterations=2 or more, or steps_per_generation a multiple of gradient_accumulation_steps",
            "bandpo train": "steps_per_generation=4, for example; or num_iterations=2",
            "verl": "data.train_batch_size a multiple of actor_rollout_ref.actor.ppo_mini_batch_size, or ppo_epochs=2",
        },
    ),
    Rule(
        name="anchor",
        reads=("configuration",),
        sees="The policy against which the ratio is taken, and whether the host provides it.",
        why="An engine for sampling gives the same token another probability than the trainer. A ratio against recomputed "
        "log-probs leaves that difference out, which makes the gradient biased.",
        healthy="Ratios against the sampler (the rollout anchor), or a weight for the difference between it and the trainer.",
        source="DPPO, arXiv:2602.04879, for the rollout anchor; IcePop, arXiv:2510.18855, for a correction",
        knobs={
            "TRL": "vllm_importance_sampling_correction=True, or an objective with the rollout anchor (dppo-kl)",
            "verl": "algorithm.rollout_correction.rollout_is=token; or bypass_mode=True with the rollout anchor (dppo-kl)",
        },
    ),
    Rule(
        name="kl",
        reads=("configuration",),
        sees="The KL to the reference in the loss, and what its gradient descends.",
        why="Some estimators have the right value and the wrong gradient: a plain k1 does not pull to the reference at all, "
        "and the plain k3 descends the other direction of the KL.",
        healthy="k1-ratio or k3-ratio: their expected gradient is that of KL(π ‖ π_ref), on older tokens too.",
        source="derived in docs/kl.md and measured there on an exact policy",
        knobs={
            "TRL": "kl=k3-ratio; in a plain GRPOConfig use_bias_correction_kl=True with importance_sampling_level=token",
            "bandpo train": "kl=k3-ratio",
            "verl": "actor_rollout_ref.actor.kl_loss_type=low_var_kl+ (verl has no form that is right for older tokens)",
        },
    ),
    Rule(
        name="sampling",
        reads=("configuration",),
        sees="Temperature, top-p, top-k and min-p of sampling.",
        why="A truncated sampler draws from another distribution than the one whose log-probs the loss uses. A token that is "
        "cut is never sampled and can only lose probability, and the ratio is biased.",
        healthy="temperature 1, top-p 1, top-k and min-p off; another temperature is correct where log-probs are taken at it.",
        source="by definition of importance sampling",
        knobs={
            "TRL": "temperature=1.0, top_p=1.0, top_k=0, min_p unset",
            "bandpo train": "temperature=1.0, top_p=1.0, top_k=0, min_p unset",
            "verl": "actor_rollout_ref.rollout.temperature=1.0, top_p=1.0 and top_k=-1",
        },
    ),
    Rule(
        name="group",
        reads=("configuration",),
        sees="Completions of a prompt, where the advantages compare them.",
        why="Of a group of one, the reward equals its mean: every advantage is 0.",
        healthy="2 or more; 8 to 64 are common.",
        source="by definition of group advantages (GRPO, arXiv:2402.03300)",
        knobs={
            "TRL": "num_generations=8, for example",
            "bandpo train": "num_generations=8, for example",
            "verl": "actor_rollout_ref.rollout.n=8, for example",
        },
    ),
    Rule(
        name="precision",
        reads=("configuration",),
        sees="Whether 16-bit weights can move at the learning rate, where the file has both.",
        why="An update smaller than half the spacing of the numbers near a weight is rounded away. bfloat16 has 8 bits of "
        "precision, so a weight of 0.02 does not move by less than 6e-5.",
        healthy="Weights in float32; or a learning rate at which weights of 0.02 still move.",
        source="spacing of floating-point numbers; 0.02 is the usual standard deviation of initial weights",
        knobs={
            "TRL": "dtype float32 with bf16=True, which computes in bfloat16 and keeps the weights in float32",
            "bandpo train": "dtype float32",
            "verl": "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        },
    ),
    Rule(
        name="interval",
        reads=("configuration",),
        sees="The interval of the ratio at p from 1e-4 to 0.99, and the fixed clip that is equal to it there.",
        why="A radius says little to who thinks in ε. The table shows how the region treats rare and common tokens.",
        healthy="None: it is for information.",
        source="computed from the region (docs/theory.md)",
        knobs={
            "TRL": "radius, max_ratio (or epsilon, epsilon_high)",
            "bandpo train": "radius, max_ratio (or epsilon, epsilon_high)",
            "verl": "+actor_rollout_ref.actor.policy_loss.radius, max_ratio (or actor.clip_ratio_low, clip_ratio_high)",
        },
    ),
    Rule(
        name="cap",
        reads=("configuration", "log"),
        sees="Where the cap max_ratio, and not the radius, sets the upper edge: below which p (configuration), and for what "
        "share of the tokens (log).",
        why="Where the cap decides, the radius has no effect on the upper edge, and changing it changes nothing.",
        healthy="Less than half of the tokens in a log.",
        source="our judgement; the cap of 10 is that of BandPO's runs, arXiv:2603.04918",
        knobs={
            "TRL": "max_ratio=inf for no cap, or a larger one",
            "bandpo train": "max_ratio=inf for no cap, or a larger one",
            "verl": "+actor_rollout_ref.actor.policy_loss.max_ratio",
        },
    ),
    Rule(
        name="memory",
        reads=("configuration", "batch"),
        sees="The logits of a micro-batch (configuration) or of all saved sequences at once (batch), and what a fused head or "
        "token_logprobs saves.",
        why="The logits of long completions and large vocabularies need more memory than the model.",
        healthy="Below 1 GiB, or a fused head.",
        source="our judgement; the multiples are measured (docs/performance.md)",
        knobs={
            "TRL": "use_liger_kernel=True, or a smaller per_device_train_batch_size",
            "verl": "actor_rollout_ref.model.use_fused_kernels=True, or a smaller ppo_max_token_len_per_gpu",
            "your own loop": "bandpo.token_logprobs",
        },
    ),
    Rule(
        name="assumed",
        reads=("configuration",),
        sees="Settings that the file does not have, with the host's defaults.",
        why="The other findings rest on them; a launch script may still change them.",
        healthy="None: it is for information.",
        source="the host's own configuration, which a test compares",
    ),
    Rule(
        name="unread",
        reads=("configuration",),
        sees="What in the configuration could not be read.",
        why="The doctor runs, imports and downloads nothing, so some values are not known. Rules that need them "
        "answer `not known`.",
        healthy="None: it is for information.",
        source="by definition",
    ),
)

_LOG = (
    Rule(
        name="nonfinite",
        reads=("log", "batch"),
        sees="NaN or infinity among log-probs or advantages, or as the value of a metric.",
        why="One NaN in the loss makes all weights NaN at the next step, from which a run does not recover.",
        healthy="None among log-probs, advantages and the metrics of the update.",
        source="by definition",
        knobs={
            "TRL": "float32 log-probs (dtype float32), a smaller learning_rate, an earlier checkpoint",
            "bandpo train": "dtype float32, a smaller learning_rate, an earlier checkpoint",
            "verl": "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32, a smaller actor.optim.lr, an earlier checkpoint",
        },
    ),
    Rule(
        name="signal",
        reads=("log", "batch"),
        sees="Whether any group ever had rewards that differ.",
        why="Where all completions of each prompt have the same reward, every advantage is 0, no weight moves and every ratio "
        "stays 1.",
        healthy="Some advantage differs from 0.",
        source="by definition of group advantages (GRPO, arXiv:2402.03300)",
        knobs={
            "TRL": "the reward function; prompts of medium difficulty; num_generations",
            "bandpo train": "the reward function; prompts of medium difficulty; num_generations",
            "verl": "the reward function; prompts of medium difficulty; actor_rollout_ref.rollout.n",
        },
    ),
    Rule(
        name="clipping",
        reads=("log", "batch"),
        sees="The share of the tokens whose gradient the region takes away (log), or that would be outside of each of several "
        "regions (batch).",
        why="A share of 0 throughout means that the region never acts; a large one, that much of the rollout teaches nothing.",
        healthy="Above 0 in some row, and at most 0.2 on average.",
        source="our judgement",
        knobs={
            "TRL": "0 throughout: num_iterations=2 or more; too many: a larger radius (epsilon), a smaller learning_rate",
            "bandpo train": "0 throughout: steps_per_generation=4; too many: a larger radius, a smaller learning_rate",
            "verl": "0 throughout: actor.ppo_epochs=2; too many: a larger radius (clip_ratio_high), a smaller optim.lr",
        },
    ),
    Rule(
        name="entropy",
        reads=("log",),
        sees="The entropy of the policy at the start and at the end.",
        why="After a collapse, rare tokens that led to rewards can no longer be sampled, and pass@k stays where it is. An "
        "explosion is a policy that forgets how to write. An upper edge holds rare tokens down; a lower edge holds them up.",
        healthy="Between a fifth and twice its start, or above 0.05 nats.",
        source="the range is our judgement; the advice: DAPO, arXiv:2503.14476, for Clip-Higher; arXiv:2509.26114, for the "
        "lower side; docs/evidence.md, where the upper half kept the entropy higher if several rare answers were right in "
        "part, and the whole band did not",
        rests_on={
            "upper-entropy": "mixed",
            "band-entropy": "mixed",
            "lower-entropy": "mixed",
            "upper-price": "holds",
        },
        knobs={
            "TRL": "collapse: objective=bandpo-kl-upper, or epsilon_high=0.28, or a smaller epsilon (the lower side); "
            "explosion: a smaller epsilon_high or radius, a smaller learning_rate, top_p=1.0",
            "bandpo train": "collapse: objective=bandpo-kl-upper or dapo; explosion: a smaller radius or learning_rate",
            "verl": "collapse: policy_loss.loss_mode=bandpo:bandpo-kl-upper, or actor.clip_ratio_high=0.28, or a smaller "
            "clip_ratio_low; explosion: a smaller clip_ratio_high or optim.lr, rollout.top_p=1.0",
        },
    ),
    Rule(
        name="overshoot",
        reads=("log",),
        sees="How far the tokens of a row are from the old policy, in radii of the band: the mean over all tokens.",
        why="A clip stops the gradient of a token outside, and does not bring it back. A step that is large enough moves "
        "tokens far outside.",
        healthy="At most 1 in every row: the average token stays inside. The furthest token has no threshold; it is "
        "30 to 50 radii out in runs that learn, and no further in runs that broke.",
        source="our judgement: the worst row of the main job of bandpo train, at the learning rate 4e-4, has 0.3 to 0.8 (three "
        "seeds), and 2.0 and 1.1 at 4 and 16 times this rate, where it forgets what it could",
        knobs={
            "TRL": "a smaller learning_rate or max_grad_norm, more samples in a step; a surrogate that pulls back (spo, cfpo)",
            "bandpo train": "a smaller learning_rate or max_grad_norm, a larger per_device_train_batch_size",
            "verl": "a smaller actor.optim.lr or actor.grad_clip, a larger actor.ppo_mini_batch_size",
        },
    ),
    Rule(
        name="mismatch",
        reads=("log", "batch"),
        sees="The mean difference between the sampler's and the trainer's log-probs of the same tokens.",
        why="The sampler gives tokens other probabilities than the trainer: precision, kernels, stale weights, truncated "
        "sampling. Ratios then measure that difference and not the update.",
        healthy="At most 0.02 nats.",
        source="our judgement",
        knobs={
            "TRL": "objective=dppo-kl or tis or icepop with use_vllm; without vLLM bf16=False; top_p=1.0, top_k=0",
            "bandpo train": "objective=dppo-kl with use_vllm; without it bf16=false; top_p=1.0, top_k=0",
            "verl": "algorithm.rollout_correction.rollout_is=token; the same dtype in rollout and actor; rollout.top_p=1.0",
        },
    ),
    Rule(
        name="groups",
        reads=("log", "batch"),
        sees="The share of the groups in which all completions have the same reward: at the end of a log, or in a batch.",
        why="Their advantages are 0, so nothing is learned from them, and the batch is smaller than it seems.",
        healthy="At most 0.8 in a log, where runs that learn come to 0.6, because many of their prompts are solved; at most "
        "half in a batch.",
        source="our judgement: the main job of bandpo train, at the learning rate 4e-4 and after 250 steps of warm-up, ends at "
        "0.49 to 0.59 (three seeds), a run that never learnt at 0.94; DAPO, arXiv:2503.14476, samples such groups again",
        knobs={
            "TRL": "prompts of medium difficulty, more num_generations; dynamic_sampling=2 or pruning (BandGRPOConfig)",
            "bandpo train": "prompts of medium difficulty, more num_generations, dynamic_sampling=2",
            "verl": "prompts of medium difficulty, a larger rollout.n; algorithm.filter_groups.enable=True (DAPO's trainer)",
        },
    ),
    Rule(
        name="length",
        reads=("log",),
        sees="The share of the completions that end at the maximal length, at the end.",
        why="They are cut off before they are done, and then scored as wrong.",
        healthy="At most half.",
        source="our judgement",
        knobs={
            "TRL": "a larger max_completion_length; mask_truncated_completions=True",
            "bandpo train": "a larger max_completion_length",
            "verl": "a larger data.max_response_length",
        },
    ),
    Rule(
        name="unscored",
        reads=("log",),
        sees="The share of the samples without a reward.",
        why="The reward function failed, took too long or could not read the reference answer; what is learnt is biased to the "
        "samples that it can score.",
        healthy="At most 0.01 on average.",
        source="our judgement",
        knobs={
            "bandpo train": "failed_reward.jsonl in the run's folder has samples; reward_timeout, or repair the function"
        },
    ),
    Rule(
        name="still",
        reads=("log",),
        sees="Whether any metric changes from row to row, and whether the gradient is ever more than 0.",
        why="A run whose metrics do not move learns nothing, whatever its settings are.",
        healthy="The gradient is more than 0 in some row, and some metric has more than one value.",
        source="by definition",
        knobs={
            "TRL": "the reward function, learning_rate, parameters that require a gradient (an adapter that is frozen)",
            "bandpo train": "the reward function, learning_rate",
            "verl": "the reward function, actor.optim.lr, the loss mask",
        },
    ),
    Rule(
        name="reward",
        reads=("log",),
        sees="The reward at the start and at the end.",
        why="It is what the run is for.",
        healthy="None: it is for information.",
        source="by definition",
    ),
)

_BATCH = (
    Rule(
        name="positive",
        reads=("batch",),
        sees="Tokens with a log-prob above 0.",
        why="These are not log-probabilities: they may be logits, or scaled.",
        healthy="None above 1e-6.",
        source="by definition",
        knobs={"your own loop": "log_softmax before the gather; bandpo.token_logprobs"},
    ),
    Rule(
        name="ratios",
        reads=("batch",),
        sees="How far the ratios of the tokens are from 1.",
        why="Where no ratio differs from 1, the batch was saved before the first step on it, or each rollout is used once: no "
        "region can act.",
        healthy="Some |log r| above 1e-6.",
        source="float32 log-probs of the same weights agree within 1e-6",
        knobs={"your own loop": "save the batch of a later step on the same rollout"},
    ),
    Rule(
        name="radius",
        reads=("batch",),
        sees="The radius of each divergence that would clip the target share (--target) of the tokens.",
        why="A radius means little by itself; the share of tokens that it clips can be compared with what is known to work.",
        healthy="None: it is for information.",
        source="computed from the batch",
        knobs={
            "TRL": "radius=...",
            "bandpo train": "radius=...",
            "verl": "+actor_rollout_ref.actor.policy_loss.radius=...",
        },
    ),
)

_MEASURES = (
    Rule(
        name="noise",
        reads=("batch",),
        sees="The size of log r between two scorings of the same tokens by the same weights, in bins of p: of the columns "
        "logprobs and again_logprobs, or of a model (--model FOLDER) with other batches, padding and dtype. Beside it, half "
        "the width of the region in log r over the 0.99 quantile of the noise, and the share of tokens that the noise alone "
        "puts outside.",
        why="A region that is narrower than the rounding of log-probs clips tokens that no update has moved.",
        healthy="Half the width is at least 3 times the noise; below 1 it is a problem.",
        source="the limits are our judgement; that the rounding of bfloat16 separates sampler and trainer is measured in "
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
        healthy="A mean of -log Z of at most 0.01 nats; 0 without truncation.",
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
        source="our judgement; AReaL (arXiv:2505.24298) is a system that limits the age",
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
        rests_on={"upper-passed": "holds", "lower-entropy": "mixed", "bottleneck": "in part"},
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
        source="the names were read in the public source of each host, see bandpo.monitoring.names",
        knobs={
            "TRL": "report_to, or the checkpoints' trainer_state.json",
            "bandpo train": "metrics.jsonl has all of them",
            "verl": "trainer.logger=[console,file]; actor_rollout_ref.rollout.calculate_log_probs=True for the sampler",
        },
    ),
)

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (*_CONFIGURATION, *_LOG, *_BATCH, *_MEASURES)}
"""All rules by name."""
