"""Small functions of the core beside two lines of torch."""

import torch

from bandpo.groups import group_advantages
from bandpo.losses import aggregate
from bandpo.preference.design import preferential_g_optimal

SIZES = [10_000, 100_000, 1_000_000]


def test_group_advantages(compare):
    def make(count):
        rewards = torch.rand(count, generator=torch.Generator().manual_seed(0))

        def plain():
            groups = rewards.view(-1, 8)
            return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()

        return {"ours": lambda: group_advantages(rewards, 8), "view, mean and std": plain}

    compare("group_advantages, groups of 8", make, [8 * size // 10 for size in SIZES])


def test_group_advantages_of_ids(compare):
    def make(count):
        rewards = torch.rand(count, generator=torch.Generator().manual_seed(0))
        ids = torch.randperm(count, generator=torch.Generator().manual_seed(1)) // 8

        def plain():
            _, place, size = ids.unique(return_inverse=True, return_counts=True)
            mean = torch.zeros(len(size)).index_add(0, place, rewards) / size
            centred = rewards - mean[place]
            variance = torch.zeros(len(size)).index_add(0, place, centred.square()) / (size - 1)
            return centred / (variance.sqrt()[place] + 1e-6)

        return {"ours": lambda: group_advantages(rewards, group_ids=ids), "unique and index_add": plain}

    compare("group_advantages, ids in any order", make, [8 * size // 10 for size in SIZES], rounds=3)


def test_aggregate(compare):
    def make(rows):
        g = torch.Generator().manual_seed(0)
        values = torch.randn(rows, 1024, generator=g)
        mask = torch.rand(rows, 1024, generator=g) < 0.9
        return {
            "ours": lambda: aggregate(values, mask, "seq-mean-token-mean"),
            "products and sums": lambda: ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
        }

    compare("aggregate, seq-mean-token-mean", make, [16, 64, 256], note="sizes are sequences of 1024 tokens")


def test_design_of_many_prompts(compare):
    def make(prompts):
        features = torch.randn(prompts, 16, 8, generator=torch.Generator().manual_seed(0))
        return {"ours": lambda: preferential_g_optimal(features)}

    note = "16 actions, 8 features; sizes are prompts"
    compare("preferential_g_optimal over prompts", make, [8, 32, 128], target="<= 1.1", rounds=3, note=note)
