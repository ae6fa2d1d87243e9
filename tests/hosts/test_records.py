"""The records of hosts without a wheel are fresh, and the adapters have the signatures that they name."""

import datetime
import importlib
import inspect
import os
import warnings

import pytest
from records import RECORDS

DAYS = 120


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("host", RECORDS)
def test_a_record_is_younger_than_120_days(host):
    """Else somebody has to compare it with the host's source again; only STRICT=1 makes a stale one an error."""
    age = (datetime.date.today() - RECORDS[host]["checked"]).days
    message = f"{host}: the record in signatures.toml was checked {age} days ago; compare it with {RECORDS[host]['repository']}"
    if age > DAYS and os.environ.get("STRICT"):
        pytest.fail(message)
    if age > DAYS:
        warnings.warn(message, stacklevel=1)


def test_a_record_says_all_that_a_stand_in_needs():
    needed = {
        "repository",
        "commit",
        "commit_date",
        "checked",
        "adapter",
        "option",
        "parameters",
        "returns",
        "caller",
        "caller_does",
    }
    for host, record in RECORDS.items():
        assert needed <= set(record), host
        assert len(record["commit"]) == 40 and record["commit_date"] <= record["checked"], host


@pytest.mark.parametrize("host", [h for h in RECORDS if RECORDS[h]["adapter"].startswith("bandpo") and h != "rllm"])
def test_an_adapter_has_the_host_s_signature(host):
    record = RECORDS[host]
    names = record["adapter"].split(".")
    found = importlib.import_module(".".join(names[:3]))
    for name in names[3:]:
        found = getattr(found, name)
    if "**kwargs" in record["parameters"]:
        first, *_, last = inspect.signature(found).parameters.values()
        assert [first.name, f"**{last.name}" if last.kind is last.VAR_KEYWORD else ""] == [
            record["parameters"][0],
            "**options",
        ]
    else:
        assert list(inspect.signature(found).parameters) == record["parameters"]
