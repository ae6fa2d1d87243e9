"""Old names give the very same objects as the new ones, warn once with the replacement, and end after a named release."""

import ast
import importlib
import pickle
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import bandpo
from bandpo import OBJECTIVES, _deprecations, policy_loss
from bandpo._deprecations import MODULES, NAMES, warn_moved
from bandpo.bounds import BySign, Clip
from bandpo.experimental import Elastic
from bandpo.surrogates import TIS
from bandpo.surrogates.sequence import tapered
from sources import modules


@pytest.fixture(autouse=True)
def no_old_name_is_loaded(monkeypatch):
    """Other tests may have used an old name, and later ones must see the warning."""
    for old in MODULES:
        monkeypatch.delitem(sys.modules, f"bandpo.{old}", raising=False)
        parent, _, name = f"bandpo.{old}".rpartition(".")
        loaded = sys.modules.get(parent)
        if loaded is not None and name in vars(loaded):
            monkeypatch.delattr(loaded, name)
    yield
    for old in MODULES:
        sys.modules.pop(f"bandpo.{old}", None)


def imported(name):
    """A module, and the messages of the warnings about itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
    return module, [
        str(w.message) for w in caught if w.category is FutureWarning and str(w.message).startswith(f"{name} ")
    ]


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_an_old_module_is_the_new_one(old, new):
    module, messages = imported(f"bandpo.{old}")
    assert messages == [f"bandpo.{old} is now bandpo.{new}; the old name works up to bandpo {_deprecations.LAST}.*"]
    assert module is importlib.import_module(f"bandpo.{new}")
    assert module.__name__ == module.__spec__.name == f"bandpo.{new}"
    assert imported(f"bandpo.{old}") == (module, [])  # the second import is silent


@pytest.mark.parametrize(("old", "new"), NAMES.items())
def test_an_old_name_is_the_new_object(old, new):
    module, _, name = new.rpartition(".")
    with pytest.warns(FutureWarning, match=f"^bandpo.{old} is now bandpo.{new}; the old name works up to") as caught:
        found = getattr(bandpo, old)
    assert found is getattr(importlib.import_module(f"bandpo.{module}"), name)
    assert [w.filename for w in caught] == [__file__]  # the user's line


def moved_within():
    """Module, old name and new name of each entry in a call of `moved_within`."""
    for module in modules().values():
        for node in ast.walk(module.tree) if "moved_within" in module.text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("moved_within"):
                for old, new in eval(ast.unparse(node.args[1])).items():
                    yield pytest.param(module.name, old, new, id=f"{module.name}.{old}")


@pytest.mark.parametrize(("module", "old", "new"), [*moved_within()])
def test_a_name_that_left_its_module_is_the_new_object(module, old, new):
    home, _, name = new.rpartition(".")
    loaded = importlib.import_module(module)
    with pytest.warns(
        FutureWarning, match=rf"^{module}\.{old} is now bandpo\.{new}; the old name works up to"
    ) as caught:
        found = getattr(loaded, old)
    assert found is getattr(importlib.import_module(f"bandpo.{home}"), name)
    assert [w.filename for w in caught] == [__file__]
    with pytest.raises(AttributeError, match="no attribute 'never_was'"):
        _ = loaded.never_was


def test_each_line_that_uses_an_old_name_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            _ = bandpo.gradient_weight
    assert len(caught) == 1


def test_old_and_new_names_do_not_meet():
    assert not set(NAMES) & {*bandpo.__all__}
    assert not {f"bandpo.{old}" for old in MODULES} & {*modules()}


@pytest.mark.parametrize(
    ("version", "works"),
    [("0.9.0", True), ("1.0.0rc1", True), ("1.12.3", True), ("2.0.0rc1", False), ("2.0.0", False), ("10.0.0", False)],
)
def test_an_old_name_ends_after_its_last_release(version, works, monkeypatch):
    monkeypatch.setattr(bandpo, "__version__", version)
    if works:
        with pytest.warns(FutureWarning, match=r"bandpo\.tokens is now bandpo\.terms"):
            importlib.import_module("bandpo.tokens")
        with pytest.warns(FutureWarning, match="DIVERGENCES"):
            _ = bandpo.DIVERGENCES
        return
    with pytest.raises(ImportError, match=r"bandpo\.tokens was removed after bandpo 1; use bandpo\.terms"):
        importlib.import_module("bandpo.tokens")
    with pytest.raises(ImportError, match=r"use bandpo\.divergences\.DIVERGENCES"):
        _ = bandpo.DIVERGENCES
    with pytest.raises(ImportError, match="use new"):
        warn_moved("old", "new")


@pytest.mark.parametrize(
    ("last", "version", "works"),
    [
        ("0.2", "0.2.9", True),
        ("0.2", "0.3.0", False),
        ("0.2", "1.0.0", False),
        ("1.3", "1.3.7", True),
        ("1.3", "1.4.0rc2", False),
    ],
)
def test_a_last_release_has_as_many_numbers_as_count(last, version, works):
    with (
        pytest.warns(FutureWarning, match=rf"up to bandpo {last}\.\*")
        if works
        else pytest.raises(ImportError, match=last)
    ):
        warn_moved("old", "new", last=last, version=version)


OLD_PICKLES = [
    pytest.param(BySign(Clip(0.1), Clip(0.2)), "bandpo.regions", id="region of regions"),
    pytest.param(TIS(cap=3.0), "bandpo.corrections", id="correction"),
    pytest.param(tapered, "bandpo.sequence_surrogates", id="function"),
    pytest.param(replace(OBJECTIVES["grpo"], name="mine"), "bandpo.composition", id="objective"),
    pytest.param(OBJECTIVES, "bandpo.objectives", id="registry"),
]


@pytest.mark.parametrize(("value", "old"), OLD_PICKLES)
def test_a_pickle_that_names_an_old_module_loads(value, old):
    new = f"bandpo.{MODULES[old.removeprefix('bandpo.')]}"
    text = pickle.dumps(value, protocol=0)
    assert f"c{new}\n".encode() in text
    with pytest.warns(FutureWarning, match=f"{old} is now {new}"):
        found = pickle.loads(text.replace(f"c{new}\n".encode(), f"c{old}\n".encode()))
    assert found == value
    assert type(found) is type(value)


def test_an_objective_that_was_pickled_before_it_had_a_kl_and_filters_loads():
    """Such a pickle is in the checkpoints of trainers whose arguments have an objective of the user."""
    old = replace(OBJECTIVES["dppo-tv"], name="mine")
    state = {k: v for k, v in vars(old).items() if k not in ("kl_coef", "kl", "filter", "filters")}
    again = object.__new__(type(old))
    again.__setstate__(state)
    assert again == old and hash(again) == hash(old)
    assert (again.kl_coef, again.filters, again.extras) == (0.0, (), old.extras)
    x = torch.full((1, 2), -1.0)
    policy_loss(logprobs=x, rollout_logprobs=x, advantages=x[:, 0], mask=x < 0, objective=again, max_length=2)


def test_a_pickle_of_a_class_that_moved_twice_loads():
    text = pickle.dumps(Elastic(micro=0.25), protocol=0).replace(b"cbandpo.experimental\n", b"cbandpo.regions\n")
    with pytest.warns(FutureWarning) as caught:
        assert pickle.loads(text) == Elastic(micro=0.25)
    assert [str(w.message).partition(";")[0] for w in caught] == [
        "bandpo.regions is now bandpo.bounds.regions",
        "bandpo.bounds.regions.Elastic is now bandpo.experimental.Elastic",
    ]


def test_the_configuration_in_an_old_checkpoint_loads(tmp_path):
    from bandpo.integrations.trl import BandGRPOConfig

    config = BandGRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    text = pickle.dumps(config, protocol=0)
    new, old = b"cbandpo.integrations.trl.config\n", b"cbandpo.integrations._trl_config\n"
    assert new in text
    with pytest.warns(FutureWarning, match=r"_trl_config is now bandpo\.integrations\.trl\.config"):
        found = pickle.loads(text.replace(new, old))
    assert type(found) is BandGRPOConfig and found.objective == config.objective


def test_a_submodule_is_imported_from_the_package_without_a_warning(monkeypatch):
    monkeypatch.delitem(sys.modules, "bandpo.configs", raising=False)
    monkeypatch.delattr(bandpo, "configs", raising=False)
    monkeypatch.setattr(_deprecations, "_SUBMODULES", ("configs",))  # one that nothing imports, as in a new process
    from bandpo import configs  # warnings are errors here

    assert configs is sys.modules["bandpo.configs"] is bandpo.configs


def test_a_submodule_without_an_import_warns(monkeypatch):
    module = importlib.import_module("bandpo.divergences")
    monkeypatch.delattr(bandpo, "divergences")
    with pytest.warns(
        FutureWarning, match=r"^bandpo\.divergences without an import is now import bandpo\.divergences; "
    ):
        assert bandpo.divergences is module


@pytest.mark.parametrize("old", _deprecations._MOVED_SUBMODULES)
def test_a_module_that_has_moved_is_found_without_an_import(old, monkeypatch):
    monkeypatch.delitem(vars(bandpo), old, raising=False)  # `delattr` would ask for the old name
    new = f"bandpo.{_deprecations.MODULES[old]}"
    with pytest.warns(FutureWarning, match=rf"^bandpo\.{old} is now {new}; "):
        found = getattr(bandpo, old)
    assert found is importlib.import_module(new)


def test_a_module_that_has_moved_is_imported_from_the_package(monkeypatch):
    monkeypatch.delitem(vars(bandpo), "tokens", raising=False)
    monkeypatch.delitem(sys.modules, "bandpo.tokens", raising=False)
    with pytest.warns(FutureWarning, match=r"^bandpo\.tokens is now bandpo\.terms; ") as caught:
        from bandpo import tokens
    assert tokens is importlib.import_module("bandpo.terms") and len(caught) == 1
