"""The table of the hosts' names, and who uses it."""

import pytest
import torch

import bandpo.metrics
from bandpo.doctor import batch
from bandpo.integrations._host_metrics import mean_proof
from bandpo.metrics import PooledSum
from bandpo.monitoring import names, symptoms


def test_a_host_has_one_meaning_for_each_of_its_names():
    for table in (names.METRICS, names.TENSORS):
        pairs = [(host, theirs) for row in table.values() for host, theirs in row.items()]
        assert len(pairs) == len(set(pairs))


def test_the_names_of_averaged_metrics_are_those_that_the_adapters_report():
    one = PooledSum(torch.tensor(1.0), torch.tensor(2.0))
    ours = (
        "clip_fraction/any",
        "clip_fraction_by_prob/low/<1e-4",
        "band/cap_fraction",
        "band/divergence_max",
        "ratio/mean",
    )
    assert list(mean_proof(dict.fromkeys(ours, one))) == [names.averaged_name(name) for name in ours]


def test_the_doctor_looks_for_each_host_s_name():
    """Every name of TRL and verl for what a rule looks at is looked for, and so is the name that verl's adapter reports."""
    looked_for = {name for spellings in symptoms.NAMES.values() for name in spellings}
    assert {names.TRL_NAMES["clip_fraction/any"], names.VERL_NAMES["clip_fraction/any"]} <= looked_for
    for ours in ("clip_fraction/any", "ratio/mean", "band/divergence_max", "band/cap_fraction", "nonfinite_fraction"):
        assert {ours, names.OWN_PREFIX["verl"] + names.averaged_name(ours)} <= looked_for
    for ours, spellings in batch.NAMES.items():
        assert spellings == (ours, *names.TENSORS[ours].values())


def test_the_old_address_of_the_tables_warns_with_the_new_one():
    for name in ("TRL_NAMES", "VERL_NAMES"):
        with pytest.warns(FutureWarning, match=f"bandpo.metrics.{name} is now bandpo.monitoring.names.{name}"):
            assert getattr(bandpo.metrics, name) is getattr(names, name)
    assert bandpo.metrics.__dict__.keys().isdisjoint({"TRL_NAMES", "VERL_NAMES"})
    with pytest.raises(AttributeError, match="NO_NAMES"):
        _ = bandpo.metrics.NO_NAMES
