"""The one declaration of the options of a region, from which the hosts' options are made."""

import dataclasses

import pytest

from bandpo import OBJECTIVES
from bandpo.integrations._host import host_objective
from bandpo.integrations._workers import launch
from bandpo.integrations.options import HELP, OPTIONS, RegionOptions, parse_options


def test_every_option_has_a_help_text_that_is_a_sentence():
    assert list(HELP) == [f.name for f in dataclasses.fields(RegionOptions)]
    for name, text in HELP.items():
        assert text[0].isupper() and text.endswith((".", "...")), name


def test_a_subclass_applies_the_region_s_options_and_none_of_its_own():
    """verl's and TRL's configurations are subclasses with many fields of their own."""

    @dataclasses.dataclass
    class Config(RegionOptions):
        other: float = 3.0

    assert Config(radius=0.1).apply(OBJECTIVES["bandpo-kl"], "x") == RegionOptions(radius=0.1).apply(
        OBJECTIVES["bandpo-kl"], "x"
    )


def test_texts_become_the_type_of_the_field():
    given = {"radius": "1e-3", "relax": "true", "divergence_top_k": "20", "divergence": "tv", "epsilon": None}
    assert parse_options(given) == {"radius": 0.001, "relax": True, "divergence_top_k": 20, "divergence": "tv"}
    for given, words in (
        ({"divergence_top_k": "2.5"}, "divergence_top_k='2.5' must be a whole number"),
        ({"divergence_top_k": True}, "must be a whole number"),
        ({"radius": "wide"}, "radius='wide' must be a number"),
        ({"divergence": 3}, "must be a name such as 'kl'"),
        ({"raduis": 3}, "unknown options raduis; choose from objective, "),
    ):
        with pytest.raises(ValueError, match=words):
            parse_options(given)


def test_the_number_of_stored_tokens_is_refused_where_nothing_stores_them():
    with pytest.raises(ValueError, match="divergence_top_k=5 would be ignored"):
        host_objective("host", "bandpo-kl", {"divergence_top_k": 5}, sampler="beside")


def test_the_launchers_show_the_help_of_each_option(capsys):
    with pytest.raises(SystemExit):
        launch("Host", "module", "package.module.patch", {}, ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(HELP[name].split()) in shown
    assert "divergence-top-k" not in shown
