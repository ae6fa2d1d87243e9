"""No secret in anything that a run leaves: planted in every option and variable that can hold one, and searched for."""

import contextlib
import copy
import dataclasses
import io
import json
import pickle
import zipfile

import pytest
import torch
import yaml

from bandpo._system.files import write_json, write_jsonl, write_text
from bandpo._system.secrets import HIDDEN, hide, is_secret, redact, redact_arguments, redact_text, remember
from bandpo.cli import main

SMALL = [
    "--max_steps", "2", "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "20",
    "--eval_prompts", "4", "--eval_samples", "2", "--logging_steps", "1", "--save_steps", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def words(text):
    return text.split()


SECRETS = words("""
hub_token HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
AZURE_STORAGE_ACCOUNT_KEY GOOGLE_API_KEY OPENAI_API_KEY MLFLOW_TRACKING_PASSWORD COMET_API_KEY NEPTUNE_API_TOKEN
CLEARML_API_SECRET_KEY token use_auth_token auth_token access_token apiKey api-key API_KEY password passwd passphrase
db.password Authorization cookie private_key client_secret credentials bearer_token github_token bot_token
push_to_hub_token secret master_key SSH_PASSPHRASE vllm_api_key
""")
ORDINARY = words("""
pad_token eos_token bos_token_id max_tokens num_input_tokens_seen average_tokens_across_devices tokenizer token_type_ids
include_tokens_per_second sort_key metric_for_best_model answer_column author HF_TOKEN_PATH key keys monkey turkey seed
objective model dataset task chat_template special_tokens stop_token mask_token decoder_start_token
""")


@pytest.mark.parametrize("key", SECRETS)
def test_names_of_secrets(key):
    assert is_secret(key)
    assert redact({key: "x", "deep": [{key: ["y", {"z": "w"}]}]}) == {
        key: HIDDEN, "deep": [{key: [HIDDEN, {"z": HIDDEN}]}]
    }  # fmt: skip
    assert redact({key: None}) == {key: None}
    assert redact_text(f"a {key}='x y' b") == f"a {key}='{HIDDEN}' b"
    assert redact_arguments([f"--{key}", "x", f"--{key}=x"]) == [f"--{key}", HIDDEN, f"--{key}={HIDDEN}"]


@pytest.mark.parametrize("key", ORDINARY)
def test_names_of_other_things(key):
    assert not is_secret(key)
    assert redact({key: "x"}) == {key: "x"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/data.jsonl", "https://host/data.jsonl"),
        ("https://user:pw@host:8/x", "https://<hidden>@host:8/x"),
        ("https://hf_abc@host/x", "https://<hidden>@host/x"),
        ("https://user:p/w@host/x", "https://<hidden>@host/x"),
        ("s3://bucket/k?X-Amz-Signature=ab&X-Amz-Credential=cd", "s3://bucket/k?X-Amz-Signature=<hidden>&X-Amz-Credential=<hidden>"),
        ("https://h/x#access_token=ab", "https://h/x#<hidden>"),
        ("https://h/x#part-2", "https://h/x#part-2"),
        ("http://u:p@proxy and ftp://a:b@c", "http://<hidden>@proxy and ftp://<hidden>@c"),
        ("me:pw@host:5432", "<hidden>@host:5432"),
        ("git@github.com:owner/name", "git@github.com:owner/name"),
        ("gpt2 hf_" + "a" * 34, "gpt2 <hidden>"),
        ("a sentence: with a colon = and signs @ home", "a sentence: with a colon = and signs @ home"),
    ],
)  # fmt: skip
def test_urls_and_known_forms(text, expected):
    assert redact(text) == expected
    assert redact({"deep": (text,)}) == {"deep": (expected,)}


def test_values_of_secret_variables_and_options_are_hidden_wherever_they_stand(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", 'odd "quoted" & <key>\n\\é')
    monkeypatch.setenv("HTTPS_PROXY", "http://user:proxy-password@host")
    monkeypatch.setenv("SOME_TOKEN", "true")  # no secret: it would be found in ordinary text
    remember({"kwargs": {"token": "from-the-options"}})
    remember(["train", "--hub_token", "from-the-command-line", "--x.password=another-password"])
    values = [
        'odd "quoted" & <key>\n\\é',
        "proxy-password",
        "from-the-options",
        "from-the-command-line",
        "another-password",
    ]
    for value in values:
        assert hide(f"a true sample {value} b") == f"a true sample {HIDDEN} b"
    write_text(tmp_path / "a.txt", "\n".join(values))
    write_json(tmp_path / "a.json", {"x": [values], values[1]: 1})
    write_jsonl(tmp_path / "a.jsonl", [{"x": v} for v in values])
    for name in ("a.txt", "a.json", "a.jsonl"):
        text = (tmp_path / name).read_text()
        for value in values:
            for part in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
                assert part not in text, (name, part)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [[HIDDEN] * 5], HIDDEN: 1}


def found_in(data, secrets):
    """Which secrets stand in some bytes, or in the members of a zip container: plain, and as UTF-16."""
    found = [s for s in secrets if s.encode() in data or s.encode("utf-16-le") in data]
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as container:
            found += [s for name in container.namelist() for s in found_in(container.read(name), secrets)]
    return found


def search(folder, secrets):
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 3
    return {(str(p.relative_to(folder)), s) for p in files for s in found_in(p.read_bytes(), secrets)}


ENVIRONMENT = {
    "HF_TOKEN": "env-hf-token-11", "WANDB_API_KEY": "env-wandb-key-12", "AWS_SECRET_ACCESS_KEY": "env-aws-secret-13",
    "AWS_ACCESS_KEY_ID": "env-aws-id-1414", "AWS_SESSION_TOKEN": "env-aws-session-15", "OPENAI_API_KEY": "env-openai-16",
    "MLFLOW_TRACKING_PASSWORD": "env-mlflow-17", "DATABASE_URL": "postgresql://u:env-database-18@h/db",
}  # fmt: skip
PLANTED = {
    "--hub_token": "option-hub-token-21",
    "--model_init_kwargs": '{"token": "option-kwargs-22", "dtype": "float32"}',
    "--vllm_server_base_url": "http://user:option-server-23@localhost:8000/v1?key=option-query-24",
    "--vllm_server_host": "me:option-host-25@localhost",
    "--run_name": "named-env-hf-token-11",  # an environment's secret inside of another option
    "--hub_model_id": "option-login-26:option-password-27@hub/x-env-openai-16",
    "--generation_kwargs": '{"api_key": "option-generation-28"}',
    "--system_prompt": "look at https://h/x?sig=option-signature-29",
}
IN_URLS = [
    "env-database-18",
    "option-server-23",
    "option-query-24",
    "option-host-25",
    "option-password-27",
    "option-signature-29",
]
ALL = [
    *(v for k, v in ENVIRONMENT.items() if k != "DATABASE_URL"), *IN_URLS, "option-hub-token-21", "option-kwargs-22",
    "option-generation-28",
]  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_no_secret_is_in_anything_that_a_run_leaves(method, tmp_path, capfd, monkeypatch):
    """A run with checkpoints, whose report is taken away as if it had been killed, resumed with its token given again."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    options = ["train", *SMALL, "--output_dir", "run"]
    planted = {k: v for k, v in PLANTED.items() if k not in ("--generation_kwargs", "--model_init_kwargs")}
    if method == "dpo":
        options = ["train", "--method", "online-dpo", "--max_steps", "1", "--rounds", "2", "--prompts_per_round", "16",
                   "--samples_per_prompt", "8", "--warm_up_steps", "100", "--eval_prompts", "4", "--eval_samples", "2",
                   "--output_dir", "run"]  # fmt: skip
        planted = {k: v for k, v in planted.items() if "vllm" not in k}
    command = [*options, *(x for pair in planted.items() for x in pair)]
    monkeypatch.setattr("sys.argv", ["bandpo", *command])
    assert main(command) == 0
    (tmp_path / "run" / "report.html").unlink()
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0
    if method == "grpo":
        assert main(["evaluate", "run/model", "--prompts", "2", "--samples", "1", "--output", "run/scores.json"]) == 0
    out, err = capfd.readouterr()
    assert search(tmp_path, ALL) == set()
    assert [s for s in ALL if s in out or s in err] == []
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["hub_token"] == HIDDEN and kept["run_name"] == f"named-{HIDDEN}"
    assert "began with other settings" not in out  # the hidden token is no change
    if method == "grpo":
        assert (
            torch.load(tmp_path / "run" / "checkpoint-2" / "training_args.bin", weights_only=False).hub_token == HIDDEN
        )
        # the file repeats the run once its secrets are given again
        assert main(["train", "--config", "run/config.yaml", "--output_dir", "b", "--dry_run", "true"]) == 2
        assert "has <hidden> in it, since a run writes no secrets; give it: --" in capfd.readouterr().err


def test_no_secret_is_in_a_comparison(tmp_path, capfd, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = ["compare", "--preset", "smoke", "--updates", "1", "--seeds", "0-1", "--objectives", "grpo", "--jobs", "1",
               "--output", "env-openai-16/x"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bandpo", *command])
    monkeypatch.setattr("bandpo.lab.comparison.command.PRESETS", smallest())
    assert main(command) == 0
    assert search(tmp_path, ALL) == set()
    assert [s for s in ALL for text in capfd.readouterr() if s in text] == []


def smallest():
    from bandpo.lab.comparison.plan import PRESETS

    return {"smoke": dataclasses.replace(PRESETS["smoke"], tuning_seeds=0, exact_seeds=0)}


def configs():
    from bandpo.integrations.trl import BandGRPOConfig
    from bandpo.integrations.trl.dpo import BandDPOConfig
    from bandpo.integrations.trl.online import OnlinePreferenceConfig

    return [BandGRPOConfig, BandDPOConfig, OnlinePreferenceConfig]


@pytest.mark.parametrize("index", range(3))
def test_every_option_that_can_hold_a_secret_is_written_without_it(index, tmp_path):
    """Each text or dictionary option of a trainer's configuration: `to_dict`, JSON and the pickle of training_args.bin."""
    cls = configs()[index]
    config = cls(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    names = [f.name for f in dataclasses.fields(cls) if "str" in str(f.type) or "dict" in str(f.type).lower()]
    assert len(names) > 40
    for name in names:
        for value in (
            "https://user:planted-31@host/x?sig=planted-32",
            {"token": "planted-33", "deep": [{"password": "planted-34"}], "url": "http://planted-35:x@h"},
        ):
            before = getattr(config, name)
            object.__setattr__(config, name, value)
            written = [pickle.dumps(config), config.to_json_string().encode(), repr(config.to_dict()).encode()]
            assert [w for w in written if b"planted" in w] == [], name
            assert getattr(config, name) == value  # it still has it
            assert getattr(copy.copy(config), name) == getattr(copy.deepcopy(config), name) == value
            object.__setattr__(config, name, before)
    config.hub_token = "planted-36"
    assert b"planted" not in pickle.dumps(config) and config.to_dict()["hub_token"] == HIDDEN
    assert pickle.loads(pickle.dumps(config)).learning_rate == config.learning_rate
    assert cls(output_dir=str(tmp_path), use_cpu=True, bf16=False).to_dict()["hub_token"] is None


def test_errors_and_messages_hide_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "env-hf-token-11")
    for command in (
        ["train", "--hub_token", "option-21-secret", "--seed", "option-21-secret"],
        ["train", "--hub_token", "option-21-secret", "--nonsense", "option-21-secret"],
        ["train", "--output_dir", "/dev/null/env-hf-token-11"],
        ["train", "--model", "https://u:option-21-secret@h/x", "--dataset", "d.jsonl", "--reward", "math"],
        ["evaluate", "env-hf-token-11"],
        ["compare", "--seeds", "env-hf-token-11"],
        ["bounds", "--radius", "env-hf-token-11"],
    ):
        with contextlib.suppress(SystemExit):  # argparse
            assert main(command) in (1, 2)
        out, err = capsys.readouterr()
        assert err.count("bandpo") and "option-21-secret" not in out + err and "env-hf-token-11" not in out + err, (
            command
        )
