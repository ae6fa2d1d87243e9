"""Saved batches with the names of each host, and what is none: what is looked at, and what to do about the rest."""

import json
import pickle
import re

import numpy as np
import pytest
import torch

from bandpo.cli import main
from bandpo.doctor import examine_batch
from bandpo.doctor.batch import load_batch
from bandpo.doctor.batch_files import columns_of, names_in, read_tensors
from bandpo.doctor.logs import is_log


def batch(rows=6, length=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=g, dtype=torch.float64) - 0.01
    return {
        "logprobs": (old + 0.3 * torch.randn(old.shape, generator=g, dtype=torch.float64)).clamp(max=-1e-6),
        "old_logprobs": old,
        "rollout_logprobs": old - 0.1,
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64),
        "mask": torch.rand(old.shape, generator=g) < 0.8,
    }


def rules(findings):
    return {f.rule: f for f in findings}


DUMPS = {  # before the first step on them: the names of the old policy, the sampler, the mask; and other columns
    "TRL's rollout": ("old_per_token_logps", "sampling_per_token_logps", "completion_mask",
                      ["prompt_ids", "prompt_mask", "completion_ids", "num_items_in_batch"]),
    "verl's DataProto": ("old_log_probs", "rollout_log_probs", "response_mask", ["responses", "token_level_scores", "uid"]),
    "OpenRLHF's Experience": ("action_log_probs", "rollout_log_probs", "action_mask", ["sequences", "values", "returns"]),
    "SkyRL's TrainingInput": ("action_log_probs", "rollout_logprobs", "loss_mask", ["sequences", "kl", "response_mask"]),
}  # fmt: skip


@pytest.mark.parametrize("host", DUMPS)
def test_a_batch_that_was_saved_before_the_first_step(host, tmp_path):
    b = batch()
    old, rollout, mask, others = DUMPS[host]
    saved = {old: b["old_logprobs"], rollout: b["rollout_logprobs"], mask: b["mask"], "advantages": b["advantages"]}
    saved |= {name: torch.ones_like(b["mask"]) for name in others}
    torch.save(saved, tmp_path / "b.pt")
    found = rules(examine_batch(load_batch(tmp_path / "b.pt")))
    assert found["ratios"].level == "note" and found["ratios"].seen.startswith("not known")
    assert found["mismatch"].level == "warning" and "by 0.1000 on average" in found["mismatch"].seen
    assert not found.keys() & {"clip fraction", "clipping", "radius"}
    assert set(names_in(tmp_path / "b.pt")) == saved.keys()
    masked = int(b["mask"].sum())
    tensors = load_batch(tmp_path / "b.pt")
    assert int(tensors["mask"].sum()) == masked  # SkyRL's loss mask, and not its response mask


def test_of_two_masks_of_another_shape_the_one_that_fits_is_used(tmp_path):
    """verl's older loss mask has the prompt, too."""
    b = batch()
    saved = {"log_prob": b["logprobs"], "old_log_probs": b["old_logprobs"], "advantages": b["advantages"],
             "response_mask": b["mask"], "loss_mask": torch.ones(6, 50)}  # fmt: skip
    torch.save(saved, tmp_path / "b.pt")
    assert torch.equal(load_batch(tmp_path / "b.pt")["mask"], b["mask"])


def test_a_dataproto_of_verl_says_what_to_do(tmp_path):
    class Stand:
        pass

    Stand.__module__, Stand.__qualname__ = __name__, "Stand"
    globals()["Stand"] = Stand
    for name in ("d.pkl", "d.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Stand(), 4))
    with pytest.raises(
        ValueError, match=r"a pickle runs code when it is read, also verl's DataProto.save_to_disk; save the"
    ):
        load_batch(tmp_path / "d.pt")
    with pytest.raises(ValueError, match=r"a batch ends in .*; a pickle runs code"):
        load_batch(tmp_path / "d.pkl")
    assert main(["doctor", str(tmp_path / "d.pkl")]) == 2


def test_an_object_in_a_file_of_torch_says_what_to_do(tmp_path):
    class Experience:
        pass

    Experience.__module__, Experience.__qualname__ = __name__, "Experience"
    globals()["Experience"] = Experience
    torch.save({"logprobs": torch.zeros(3), "x": Experience()}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match=r"something else than tensors .*; save the tensors alone: torch.save\(\{"):
        load_batch(tmp_path / "e.pt")


EXPORTED = [
    {"token_ids": [1, 2, 3], "trainer_logprobs": [-0.5, -1.0, -2.0], "inference_logprobs": [-0.6, -1.1, -1.5],
     "advantages": [1.0, 1.0, 1.0], "loss_mask": [True, True, False], "mismatch_kl": None, "env_names": ["a", "a", "a"]},
    {"token_ids": [4, 5], "trainer_logprobs": [-0.1, -0.2], "inference_logprobs": [-0.2, -0.2], "advantages": [-1.0, -1.0],
     "loss_mask": [True, True], "mismatch_kl": [0.1, 0.2], "env_names": ["b", "b"]},
]  # fmt: skip


def test_the_tokens_that_prime_rl_exports(tmp_path, capsys):
    path = tmp_path / "rank_0.jsonl"
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in EXPORTED))
    assert not is_log(path)
    b = load_batch(path)
    flat = {name: [x for row in EXPORTED for x in row[name]] for name in ("trainer_logprobs", "inference_logprobs")}
    assert b["logprobs"].tolist() == flat["trainer_logprobs"]
    assert b["old_logprobs"].tolist() == flat["inference_logprobs"]
    assert b["mask"].tolist() == [True, True, False, True, True]
    assert "ratios" in rules(examine_batch(b))
    assert main(["doctor", str(path), "--json"]) in (0, 1)
    [section] = json.loads(capsys.readouterr().out)
    [columns] = [f for f in section["findings"] if f["rule"] == "columns"]
    assert columns["seen"] == (
        "4 of 7 columns looked at: trainer_logprobs, inference_logprobs, advantages, loss_mask; not token_ids, "
        "mismatch_kl, env_names"
    )
    one = [{**row, "advantages": row["advantages"][0]} for row in EXPORTED]  # one number for the sequence
    path.write_text("".join(json.dumps(row) + "\n" for row in one))
    assert load_batch(path)["advantages"].tolist() == b["advantages"].tolist()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"logprobs": [1.0, 2.0], "advantages": [1.0]}'], "line 1 has no list of numbers, or lists of different lengths"),
        (['{"logprobs": [1.0], "advantages": [1.0]}', '{"logprobs": [1.0]}'], "some of its lines lack a list"),
        (['{"logprobs": [null], "advantages": [1.0]}'], "cannot be read as a batch"),
        (['{"logprobs": [[1.0]], "advantages": [[1.0]]}', "[]"], "line 2 is no object"),
        (['{"logprobs": ["a"], "advantages": [1.0]}'], "cannot be read as a batch"),
        (['{"logprobs": [' + "[" * 2000], "more than 16,777,216 bytes or 1,000 lists"),
        (['{"logprobs": [1.0], "advantages": {}}', "{"], "line 2 is not JSON"),
    ],
)  # fmt: skip
def test_lines_that_are_no_batch_are_refused(lines, message, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_batch(path)


def test_columns_of_each_format(tmp_path):
    from safetensors.torch import save_file

    b = {name: tensor.float() for name, tensor in batch().items()} | {"x\x1b": torch.zeros(2)}
    save_file(b, tmp_path / "b.safetensors", metadata={"a": "b"})
    torch.save(b, tmp_path / "b.pt")
    np.savez(tmp_path / "b.npz", **{name: tensor.numpy() for name, tensor in b.items()})
    for suffix in ("safetensors", "pt", "npz"):
        found = columns_of(tmp_path / f"b.{suffix}", {"logprobs", "mask"})
        assert found.numbers == {"understood": 2, "others": 4}
        assert "not " in found.seen and read_tensors(tmp_path / f"b.{suffix}", frozenset({"mask"})).keys() == {"mask"}
