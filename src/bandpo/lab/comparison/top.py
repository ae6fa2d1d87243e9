"""The extras of objectives that ask for top-K tokens, from the whole distribution, which the lab always has."""

from typing import NamedTuple

from torch import Tensor

from bandpo.objective import Objective


class TopTokens(NamedTuple):
    """The tokens that a sampler ranks highest at each place of its completions.

    Args:
        ids: `(sequences, time, K)`.
        logprobs: Their log-probs under the sampler, `(sequences, time, K)`.
        sampled: Whether the sampled token is one of them, bool, `(sequences, time)`.
    """

    ids: Tensor
    logprobs: Tensor
    sampled: Tensor


def has_inputs(objective: Objective) -> bool:
    """Whether the lab has what an objective asks for: nothing else, statistics of groups, or top-K tokens."""
    return not objective.extras or objective.group_stats is not None or objective.top_k is not None


def top_extras(top: TopTokens, scores: Tensor) -> dict[str, Tensor]:
    """The extras of an objective that asks for top-K tokens.

    Args:
        top: The sampler's top-K tokens.
        scores: Log-probs of every token under the policy in training, `(sequences, time, vocabulary)`, with gradient.
    """
    return {
        "topk_logprobs": scores.gather(-1, top.ids),
        "old_topk_logprobs": top.logprobs,
        "sampled_in_topk": top.sampled,
    }


def top_tokens(scores: Tensor, chosen: Tensor, k: int) -> TopTokens:
    """The K tokens of the largest log-probs at each place; all of them where the vocabulary is smaller.

    Args:
        scores: Log-probs of every token under the sampler, `(sequences, time, vocabulary)`.
        chosen: The sampled tokens, `(sequences, time)`.
        k: K.
    """
    values, ids = scores.topk(min(k, scores.shape[-1]))
    return TopTokens(ids, values, (ids == chosen.unsqueeze(-1)).any(-1))
