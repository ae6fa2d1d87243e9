"""A mask is bool, or 0 and 1, wherever one is taken: a label of -100 is refused, never counted as a valid token."""

import pytest
import torch

from bandpo import KL, Clip, radius_for
from bandpo.bounds.calibration import outside_fraction
from bandpo.doctor import examine_batch
from bandpo.preference.probe import pool_hidden
from bandpo.selection.packing import pack_rows
from bandpo.terms import sequence_log_ratio
from bandpo.testing import check_logprobs

LABELS = torch.tensor([[-100, 1, 1]])
X = torch.tensor([[0.1, 0.2, 0.3]])
TOKENS = {"log_ratio": X, "old_logprobs": X - 2, "advantages": torch.ones_like(X)}

TAKERS = {
    "outside_fraction": lambda mask: outside_fraction(Clip(), TOKENS | {"mask": mask}),
    "radius_for": lambda mask: radius_for(KL, 0.5, TOKENS | {"mask": mask}),
    "examine_batch": lambda mask: examine_batch(
        {"logprobs": X - 2, "old_logprobs": X - 2.1, "advantages": torch.ones_like(X), "mask": mask}
    ),
    "pool_hidden": lambda mask: pool_hidden([torch.ones(1, 3, 2)], mask),
    "pack_rows": lambda mask: pack_rows(torch.ones(1, 3, dtype=torch.long), mask, capacity=8),
    "check_logprobs": lambda mask: check_logprobs(X - 2, mask),
    "sequence_log_ratio": lambda mask: sequence_log_ratio(X, mask),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_labels_are_no_mask(taker):
    TAKERS[taker](LABELS.clamp(min=0))
    with pytest.raises(ValueError, match=r"must be bool, or 0 and 1, got .*for labels, in which -100 marks"):
        TAKERS[taker](LABELS)
