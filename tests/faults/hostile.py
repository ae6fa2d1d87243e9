"""Files that a stranger could hand over: each tries to run code, reach the network, read another file, hang, fill the memory,
or write to the terminal. `plant` makes them in a folder; whoever reads foreign files can be tested on them.

`bandpo doctor` is tested on all of them (test_hostile.py). For other commands take those of a kind, say
`[h for h in plant(folder) if h.kind == "run"]`, and pass `h.path`.
"""

import io
import json
import os
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

SECRET = "TOP-SECRET-OF-ANOTHER-FILE"
MODULE = "planted_module"
"""Can be imported from the folder: its import, and each call of what is in it, leaves the file `pwned` there."""


class Hostile(NamedTuple):
    """One file.

    Args:
        name: For the test.
        kind: yaml, script, log, batch, run (a folder), or special (no regular file).
        path: Where it is.
    """

    name: str
    kind: str
    path: Path


TRL = {"per_device_train_batch_size": 8, "num_generations": 4, "num_iterations": 2, "learning_rate": 1e-6}
RUN = {"task": "countdown", "objective": "bandpo-kl", **TRL}
VERL = "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 "
ROW = '{"entropy": 1.0, "reward": 0.5}\n'
NAME = "\x1b[2J\r\u202e"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\r\x08\x9b31m\u202e\u2066\x00"


def plant(folder: Path) -> list[Hostile]:
    """Make all of them.

    Args:
        folder: An empty one, which the caller puts on `sys.path`.
    """
    (folder / f"{MODULE}.py").write_text(
        f"open({str(folder / 'pwned')!r}, 'w').close()\n"
        "from bandpo import OBJECTIVES\nOBJ = OBJECTIVES['grpo']\n"
        f"def run(*args, **kwargs):\n    open({str(folder / 'pwned')!r}, 'w').close()\n    return 1.0\n"
    )
    (folder / "evil.py").write_text(f"import {MODULE}\n")
    (folder / "secret.yaml").write_text(f"{SECRET}: [")
    _model(folder)
    for path, content in _contents(folder).items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for name, make in (_batches() | _other_logs()).items():
        make(folder / name)
    _make_runs(folder)
    _make_special(folder)
    return listed(folder)


def listed(folder: Path) -> list[Hostile]:
    """The same without making them.

    Args:
        folder: Where they are, or would be.
    """
    kinds = {".yaml": "yaml", ".sh": "script", ".jsonl": "log"}
    return [
        *(Hostile(path.stem, kinds[path.suffix], path) for path in _contents(folder)),
        *(Hostile(name.replace(".", "_"), "batch", folder / name) for name in _batches()),
        *(Hostile(name.replace(".", "_"), "log", folder / name) for name in _other_logs()),
        *(Hostile(name, "run", folder / name) for name in _runs(folder)),
        *(Hostile(f"special_{name}", "special", path) for name, path in _special(folder).items()),
    ]


def _contents(folder: Path) -> dict[Path, str | bytes]:
    return {
        folder / f"{name}{suffix}": content
        for suffix, contents in (
            (".yaml", _imports_in_yaml(folder, folder / "model") | _yaml_structures()),
            (".sh", _scripts(folder)), (".jsonl", _logs()),
        )
        for name, content in contents.items()
    }  # fmt: skip


def _model(folder: Path) -> None:
    """A model's folder whose configuration asks for its own code."""
    model = folder / "model"
    model.mkdir()
    automap = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": automap, "vocab_size": 1000}))
    code = f"open({str(folder / 'pwned')!r}, 'w').close()\nfrom transformers import PretrainedConfig as XConfig\n"
    (model / "configuration_x.py").write_text(code)
    (model / "modeling_x.py").write_text(code)
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))


def _imports_in_yaml(folder: Path, model: Path) -> dict[str, str | bytes]:
    target = f"{MODULE}:OBJ"
    trl = {
        "objective": target, "divergence": f"{MODULE}:run", "radius_target": f"{MODULE}:run",
        "model_name_or_path": str(model), "tokenizer_name_or_path": str(model), "trust_remote_code": True,
        "dataset_name": str(folder / "evil.py"), "dataset_config": target, "chat_template_path": "/dev/zero",
        "reward_funcs": [f"{MODULE}.run"], "reward_model_name_or_path": str(model), "_target_": f"{MODULE}.run",
        "deepspeed": "/dev/zero", "fsdp": "full_shard auto_wrap", "fsdp_config": "/dev/zero", "accelerator_config": "/dev/zero",
        "parallelism_config": {"_target_": f"{MODULE}.run"}, "optim": f"{MODULE}.run", "optim_args": "x=__import__('os')",
        "lr_scheduler_type": f"{MODULE}.run", "lr_scheduler_kwargs": '{"a": ' * 500, "report_to": "all",
        "model_init_kwargs": {"attn_implementation": f"{MODULE}/run", "trust_remote_code": True},
        "output_dir": str(folder / "made-by-a-configuration"), "logging_dir": str(folder / "made-by-a-configuration"),
        "ddp_backend": "nccl", "torch_compile": True, "push_to_hub": True, "hub_model_id": "owned/model",
        "resume_from_checkpoint": str(model), "vllm_server_base_url": "http://127.0.0.1:9", "use_vllm": True,
        "callbacks": [target], "external_lib": MODULE, "generation_kwargs": {"logits_processor": target},
        "pruning": "[" * 100_000, "debug": "underflow_overflow tpu_metrics_debug", "rollout_func": target,
    }  # fmt: skip
    found = {f"trl_{key}": yaml.safe_dump({**TRL, key: value}) for key, value in trl.items()}
    run = {
        "objective": target, "reward": f"{MODULE}:run", "model": str(model), "dataset": str(folder / "evil.py"),
        "pairs": str(folder / "evil.py"), "system_prompt": ESCAPES, "trust_remote_code": True,
    }  # fmt: skip
    found |= {f"run_{key}": yaml.safe_dump({**RUN, key: value}) for key, value in run.items()}
    policy = "actor_rollout_ref.actor.policy_loss."
    verl = {
        f"{policy}loss_mode": f"bandpo:{target}", f"{policy}objective": target, f"{policy}_target_": f"{MODULE}.run",
        "actor_rollout_ref.model.external_lib": MODULE, "custom_reward_function.path": str(folder / f"{MODULE}.py"),
        "actor_rollout_ref.model.path": str(model), "reward_model.reward_manager": f"{MODULE}.run",
        "data.custom_cls.path": str(folder / "evil.py"), "_target_": f"{MODULE}.run",
        "actor_rollout_ref.actor.ppo_epochs": "${oc.env:HOME}", "hydra.searchpath": [f"pkg://{MODULE}"],
        "actor_rollout_ref.actor.clip_ratio_high": "${python:__import__('os').system('touch pwned')}",
    }  # fmt: skip
    base = {
        "actor_rollout_ref": {"actor": {"ppo_epochs": 2, "policy_loss": {"loss_mode": "bandpo"}}, "rollout": {"n": 8}}
    }
    for key, value in verl.items():
        found[f"verl_{key.rpartition('.')[2]}_{len(found)}"] = yaml.safe_dump(_with(base, key.split("."), value))
    for name, entry in {
        "up": {"..": "secret"},
        "absolute": {str(folder): "secret"},
        "name": {"group": "../secret"},
    }.items():
        found[f"verl_defaults_{name}"] = yaml.safe_dump({**base, "defaults": ["ppo_trainer", entry]})
    found["verl_defaults_many"] = yaml.safe_dump({**base, "defaults": [{"g": "x"}] * 5000})
    return found


def _with(tree: dict, keys: list[str], value: object) -> dict:
    head, *rest = keys
    return {**tree, head: _with(tree.get(head, {}), rest, value) if rest else value}


def _yaml_structures() -> dict[str, str | bytes]:
    n = 1 << 20
    trl, verl = yaml.safe_dump(TRL), "actor_rollout_ref: {actor: {ppo_epochs: 2}}\n"
    aliases = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    nested = "*a12"
    merges = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
    )
    return {
        "yaml_apply": f"!!python/object/apply:{MODULE}.run []\n",
        "yaml_apply_value": trl + f"top_p: !!python/object/apply:{MODULE}.run []\n",
        "yaml_name": trl + f"reward_funcs: !!python/name:{MODULE}.run\n",
        "yaml_module": trl + f"reward_funcs: !!python/module:{MODULE}\n",
        "yaml_new": trl + f"x: !!python/object/new:{MODULE}.run {{}}\n",
        "yaml_local_tag": trl + "x: !exec 'touch pwned'\n",
        "yaml_alias_bomb": aliases + trl,
        "yaml_alias_bomb_verl": aliases + verl,
        "yaml_alias_bomb_as_number": aliases.replace("range", "")
        + f"actor_rollout_ref: {{actor: {{ppo_epochs: {nested}}}}}\n",
        "yaml_merge_bomb": merges + trl,
        "yaml_text_bomb": f"a: &a {'x' * 500_000}\nb: [{'*a, ' * 1000}]\n" + verl,
        "yaml_self": "a: &a\n  b: *a\n" + verl,
        "yaml_self_list": "a: &a [*a]\n" + trl,
        "yaml_self_merge": "a: &a {<<: *a}\n" + trl,
        "yaml_self_key": "actor_rollout_ref: &a\n  actor: *a\n",
        "yaml_deep_lists": "num_generations: " + "[" * (n // 2),
        "yaml_deep_mappings": "{a: " * (n // 4),
        "yaml_deep_blocks": "".join(" " * i + "a:\n" for i in range(1400)),
        "yaml_dashes": "- " * (n // 2),
        "yaml_many_keys": "".join(f"k{i}: 1\n" for i in range(19_000)) + trl,
        "yaml_long_keys": "".join(f"{'k' * 5000}{i}: 1\n" for i in range(200)) + verl,
        "yaml_long_paths": "actor_rollout_ref:\n"
        + "".join(" " * (i + 1) + f"{'k' * 20_000}:\n" for i in range(45))
        + " " * 46
        + "x: 1\n",
        "yaml_colliding_keys": "".join(f"{i * (2**61 - 1)}: 1\n" for i in range(9000)) + trl,
        "yaml_digits_500": trl + f"num_iterations: {'9' * 500}\n",
        "yaml_digits_100000": trl + f"top_k: {'9' * 100_000}\n",
        "yaml_sexagesimal": trl + f"top_k: 1{':59' * 300_000}\n",
        "yaml_hex": trl + f"top_k: 0x{'f' * 900_000}\n",
        "yaml_large": "#" * (5 << 20),
        "yaml_huge_numbers": yaml.safe_dump({**TRL, "max_completion_length": 10**30, "num_generations": 10**25}),
        "yaml_zero_numbers": yaml.safe_dump({**TRL, "num_generations": 0, "per_device_train_batch_size": 0}),
        "yaml_nan": trl + "temperature: .nan\nepsilon: .inf\n",
        "yaml_wrong_kinds": yaml.safe_dump({k: [{"x": 1}] for k in TRL}),
        "yaml_escapes_in_key": yaml.safe_dump({**TRL, f"key{ESCAPES}": 1}),
        "yaml_escapes_in_value": yaml.safe_dump({**TRL, "loss_type": ESCAPES, "model_name_or_path": ESCAPES}),
        "yaml_escapes_in_objective": yaml.safe_dump({**TRL, "objective": ESCAPES}),
        "yaml_escapes_in_verl": yaml.safe_dump(
            {"actor_rollout_ref": {"rollout": {"name": ESCAPES}, "actor": {"policy_loss": {"loss_mode": ESCAPES}}}}
        ),
        "yaml_escapes_in_import": yaml.safe_dump({**TRL, "objective": f"a:{ESCAPES}"}),
        "yaml_escapes_in_error": b"a: [\x1b[2J",
        "yaml_not_utf8": b"\xff\xfea\x00:\x00",
        "yaml_null_key": "? \n: 2\n? [1]\n: 3\n",
        "yaml_other_host": "".join(f"{h}: {ESCAPES!r}\n" for h in ("grpo", "policy")),
    }


def _scripts(folder: Path) -> dict[str, str]:
    n = 1 << 18
    policy = "actor_rollout_ref.actor.policy_loss."
    return {
        "sh_loss_mode": f"{VERL} {policy}loss_mode=bandpo:{MODULE}:OBJ\n",
        "sh_objective": f"{VERL} {policy}loss_mode=bandpo +{policy}objective={MODULE}:OBJ\n",
        "sh_target": f"{VERL} {policy}_target_={MODULE}.run {policy}loss_mode=bandpo +{policy}radius=0.1\n",
        "sh_python_tag": f"{VERL} actor_rollout_ref.actor.ppo_epochs='!!python/object/apply:{MODULE}.run []'\n",
        "sh_substitution": f"{VERL} actor_rollout_ref.actor.ppo_epochs=$(touch {folder}/pwned)\n",
        "sh_backticks": f"{VERL} actor_rollout_ref.actor.ppo_epochs=`touch {folder}/pwned`\n",
        "sh_eval": f"eval 'touch {folder}/pwned'\nsource {folder}/evil.sh\n{VERL}\n",
        "sh_here": f"python - <<EOF\nopen('{folder}/pwned', 'w')\nEOF\n{VERL}\n",
        "sh_secret": f"{VERL} actor_rollout_ref.actor.ppo_epochs=$(cat {folder}/secret.yaml) @{folder}/secret.yaml\n",
        "sh_config_path": f"{VERL} --config-path {folder} --config-name secret\n",
        "sh_quadratic_key": VERL + "a.b-" * (n // 5),
        "sh_quadratic_dots": VERL + "a." * (n // 3),
        "sh_blank_lines": "\n" * (n - 200) + VERL,
        "sh_open_quotes": VERL + "\"'" * (n // 3),
        "sh_open_braces": VERL + "${" * (n // 3),
        "sh_open_parentheses": VERL + "$(" * (n // 3),
        "sh_backslashes": VERL + "\\" * (n - 200),
        "sh_here_documents": VERL + "<<A\n" * (n // 5),
        "sh_variables": "".join(f"V{i}=$V{i + 1}\n" for i in range(12_000)) + f"{VERL} $V0 " + "$V1 " * 9000,
        "sh_many_keys": VERL + "".join(f"a.b{i}=1 " for i in range(18_000)),
        "sh_many_unresolved": VERL + "".join(f"a.b{i}=$X " for i in range(16_000)),
        "sh_many_commands": f"{VERL}\n" * 2500,
        "sh_long_value": f"{VERL} {policy}loss_mode={'x' * 200_000}\n",
        "sh_digits": f"{VERL} actor_rollout_ref.actor.ppo_epochs={'9' * 4000}\n",
        "sh_self_reference": f"{VERL} data.train_batch_size='${{data.train_batch_size}}'\n",
        "sh_yaml_bomb": f"{VERL} data.train_batch_size='{'[' * 5000}'\n",
        "sh_escapes": f"{VERL} a.b$X{ESCAPES} {policy}loss_mode='{ESCAPES}' --config-name '{ESCAPES}' ${ESCAPES}\n",
        "sh_other_host": f"python -m skyrl_train.entrypoints.main_base trainer.x='{ESCAPES}'\n",
        "sh_large": "a=1\n" * (1 << 20),
    }


def _logs() -> dict[str, bytes]:
    row, lists = ROW.encode(), b'{"reward": [' + b"[]," * 80_000 + b"[]]}\n"
    return {
        "log_digits": b'{"reward": ' + b"9" * 4000 + b"}\n" * 1,
        "log_many_digits": b'{"reward": -' + b"9" * 200_000 + b"}\n",
        "log_deep": b'{"reward": ' + b"[" * 100_000 + b"\n",
        "log_lists": lists * 40,
        "log_nested_rows": (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}\n") * 10_000,
        "log_wide": b"{" + b",".join(b'"k%d": 0' % i for i in range(300_000)) + b"}\n",
        "log_empty_rows": b"{}\n" * 5_000_000,
        "log_blank_lines": b"\n" * 1_000_000,
        "log_many_rows": row * 100_000,
        "log_one_line": b'{"a": "' + b"x" * 20_000_000 + b'"}\n',
        "log_escapes": json.dumps({"reward": 1.0, f"entropy{ESCAPES}": 2.0}).encode()
        + b"\n"
        + ESCAPES.encode()
        + b"\n",
        "log_nan": b'{"reward": NaN, "entropy": Infinity, "loss": -Infinity}\n' * 20,
        "log_kinds": b'{"reward": true, "entropy": "1e999", "loss": {"a": 1}, "grad_norm": 1e999}\n',
        "log_not_utf8": b'{"reward": "\xff\xfe"}\n',
        "log_surrogates": b'{"reward": "\\ud800", "\\udfff": 1, "entropy": 1.0}\n',
        "log_no_end": b'{"reward": 1.0}',
        "log_null": b"\x00" * 100_000,
    }


CALL = f"c{MODULE}\nrun\n(tR.".encode()
"""A pickle that calls the planted module."""


def _batches() -> dict[str, Callable[[Path], None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about tensors that are rare
        rare = {
            "batch_sparse.pt": torch.eye(3).to_sparse(),
            "batch_csr.pt": torch.eye(3).to_sparse_csr(),
            "batch_quantized.pt": torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8),
            "batch_nested.pt": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "batch_sparse_huge.pt": torch.sparse_coo_tensor([[0], [0]], [1.0], (1_000_000, 1_000_000)),
        }
    x = torch.linspace(-2, -1, 12).view(3, 4)
    good = {"logprobs": x, "old_logprobs": x - 0.1, "advantages": torch.tensor([1.0, -1.0, 0.5])}

    def torch_file(**changes: object) -> Callable[[Path], None]:
        return lambda path: torch.save({**good, **changes}, path)

    def rewritten(change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            torch.save(good, path)
            with zipfile.ZipFile(path) as old:
                parts = {name: old.read(name) for name in old.namelist()}
            with zipfile.ZipFile(path, "w", how) as new:
                for name, data in parts.items():
                    new.writestr(name, change(name, data))

        return make

    def zeros_npz(path: Path) -> None:
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file,
            file.open("logprobs.npy", "w") as out,
        ):
            np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (100_000_000,)})
            for _ in range(100):
                out.write(b"\0" * 4_000_000)

    def npz_header(shape: str, descr: str = "'<f4'", content: bytes = b"\0" * 64) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
            data = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + content
            with zipfile.ZipFile(path, "w") as file:
                for name in good:
                    file.writestr(f"{name}.npy", data)

        return make

    def overlapping(path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **{k: v.numpy() for k, v in good.items()})
        path.write_bytes(buffer.getvalue() + b"trailing" * 100)

    def header(length: int, text: bytes) -> Callable[[Path], None]:
        return lambda path: path.write_bytes(struct.pack("<Q", length) + text)

    def safe(text: str, data: bytes = b"\0" * 64) -> Callable[[Path], None]:
        return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)

    evil = b"\x80\x02}X\x08\x00\x00\x00logprobs" + CALL[:-1] + b"s."
    huge = '{"logprobs": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'
    float4 = getattr(torch, "float8_e8m0fnu", torch.float8_e5m2)
    return {
        **{name: torch_file(logprobs=tensor) for name, tensor in rare.items()},
        "batch_pickle.pt": lambda path: path.write_bytes(CALL),
        "batch_evil.pt": rewritten(lambda n, d: evil if n.endswith("pkl") else d),
        "batch_expanded.pt": torch_file(logprobs=torch.zeros(1).expand(1_000_000, 1_000_000)),
        "batch_expanded_advantages.pt": torch_file(advantages=torch.zeros(1, 1).expand(1_000_000_000, 1)),
        "batch_meta.pt": torch_file(logprobs=torch.empty(3, 4, device="meta")),
        "batch_complex.pt": torch_file(logprobs=x.to(torch.complex64)),
        "batch_complex_mask.pt": torch_file(mask=x.to(torch.complex64)),
        "batch_float8.pt": torch_file(logprobs=x.to(float4), mask=x.to(torch.float8_e4m3fn)),
        "batch_scalar.pt": torch_file(logprobs=torch.tensor(1.0)),
        "batch_many_axes.pt": torch_file(logprobs=torch.zeros([1] * 60)),
        "batch_list.pt": lambda path: torch.save([x], path),
        "batch_bytearray.pt": lambda path: torch.save({"logprobs": bytearray(10)}, path),
        "batch_compressed.pt": rewritten(lambda _, data: data, zipfile.ZIP_DEFLATED),
        "batch_memo.pt": rewritten(lambda n, d: b"\x80\x02}r\xff\xff\xff\x7f." if n.endswith("pkl") else d),
        "batch_long_pickle.pt": rewritten(
            lambda n, d: b"\x80\x02" + b"N0" * 2_000_000 + b"}." if n.endswith("pkl") else d
        ),
        "batch_deep_pickle.pt": rewritten(
            lambda n, d: b"\x80\x02" + b"(" * 100_000 + b"}." if n.endswith("pkl") else d
        ),
        "batch_bomb.npz": zeros_npz,
        "batch_shape.npz": npz_header("(1000000000000,)"),
        "batch_deep_shape.npz": npz_header("(" * 3000 + ")" * 3000),
        "batch_long_shape.npz": npz_header("(" + "1," * 100_000 + ")"),
        "batch_objects.npz": npz_header("(1,)", "'|O'", CALL),
        "batch_text.npz": lambda path: np.savez(path, logprobs=np.array(["a"]), advantages=np.array(["b"])),
        "batch_trailing.npz": overlapping,
        "batch_header.safetensors": header(1 << 60, b"{}"),
        "batch_header_size.safetensors": header((1 << 64) - 1, b"{}"),
        "batch_huge.safetensors": safe(huge),
        "batch_deep.safetensors": safe('{"a": ' + "[" * 100_000),
        "batch_wide.safetensors": safe("{" + ",".join(f'"k{i}": 0' for i in range(100_000)) + "}"),
        "batch_escapes.safetensors": safe(ESCAPES),
        "batch_empty.safetensors": lambda path: path.write_bytes(b""),
        "batch_infinite.safetensors": lambda path: save_file(
            {**good, "logprobs": torch.full((3, 4), float("inf"))}, path
        ),
    }


def event_record(data: bytes, length: int | None = None) -> bytes:
    """A record of TensorBoard's event files, of which a reader checks the sum of the length.

    Args:
        data: What it holds.
        length: The length that it says, None for the true one.
    """
    header = struct.pack("<Q", len(data) if length is None else length)
    crc = 0xFFFFFFFF
    for byte in header:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return header + struct.pack("<I", masked) + data + b"\0" * 4


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def _scalar(tag: bytes, value: float = 1.0) -> bytes:
    return _field(1, _field(1, tag) + b"\x15" + struct.pack("<f", value))


def _database(script: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        database = sqlite3.connect(path)
        database.executescript(script)
        database.commit()
        database.close()

    return make


def _other_logs() -> dict[str, Callable[[Path], None]]:
    """Logs that are no JSON lines."""

    def text(content: str | bytes) -> Callable[[Path], None]:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        return lambda path: path.write_bytes(data)

    def damaged_database(path: Path) -> None:
        good(path)
        data = bytearray(path.read_bytes())
        data[120:2000:7] = b"\xff" * len(data[120:2000:7])
        path.write_bytes(data)

    start = event_record(b"\x1a\x0dbrain.Event:2")
    table = "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)"
    put = "INSERT INTO metrics (run_name, step, metrics) VALUES"
    good = _database(f"{table}; {put} ('r', 1, '{{\"entropy\": 1.0}}')")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    computed = table.replace("metrics TEXT", "metrics AS (hex(zeroblob(400000000)))")
    quote = ESCAPES.replace("'", "''").replace("\x00", "")
    return {
        "log_length.tfevents": text(start + event_record(b"x" * 64, 1 << 62)),
        "log_length_over.tfevents": text(start + event_record(b"x" * 64, (1 << 64) - 1)),
        "log_fields.tfevents": text(start + event_record(b"\x08\x01" * 400_000)),
        "log_varint.tfevents": text(start + event_record(b"\xff" * 1_000_000)),
        "log_inner_length.tfevents": text(start + event_record(b"\x2a\xff\xff\xff\xff\x7f" + b"x" * 64)),
        "log_tags.tfevents": text(start + event_record(_field(5, b"".join(_scalar(b"t%d" % i) for i in range(20_000))))),
        "log_long_tag.tfevents": text(start + event_record(_field(5, _scalar(b"entropy" * 100_000)))),
        "log_escapes.tfevents": text(
            start + event_record(_field(5, _scalar(ESCAPES.encode()) + _scalar(b"entropy")))
        ),
        "log_many.tfevents": text(start + event_record(_field(5, _scalar(b"entropy"))) * 20_000),
        "log_other.tfevents": text(b"x" * 1_000_000),
        "log_wide.csv": text("a," * 100_000 + "\n"),
        "log_wide_row.csv": text("entropy\n" + "1," * 100_000 + "\n"),
        "log_cell.csv": text("entropy\n" + "1" * 3_000_000 + "\n"),
        "log_quote.csv": text('entropy\n"' + "1\n" * 1_000_000),
        "log_null.csv": text(b"entropy\n" + b"\0" * 100_000 + b"\n"),
        "log_escapes.csv": text(f"{ESCAPES},entropy\n1,{ESCAPES}\n1,2\n".replace("\r", "")),
        "log_runs.csv": text(",".join(f"{ESCAPES[:9]}{i} - entropy" for i in range(4000)) + "\n1\n"),
        "log_digits.csv": text("entropy\n" + ("9" * 5000 + "\n") * 100),
        "log_deep.json": text("[" * 1_000_000),
        "log_nested.json": text("[" * 90_000 + "]" * 90_000),
        "log_lists.json": text("[" + "[]," * 900_000 + "[]]"),
        "log_objects.json": text('{"log_history": [' + "{}," * 900_000 + "{}]}"),
        "log_values.json": text('{"a": [' + "0," * 900_000 + "0]}"),
        "log_columns.json": text("{" + ",".join(f'"c{i}": [1]' for i in range(300_000)) + "}"),
        "log_digits.json": text('[{"reward": ' + "9" * 1_000_000 + "}]"),
        "log_escapes.json": text(json.dumps([{"entropy": 1.0, ESCAPES: 1.0, "reward": ESCAPES}])),
        "log_step.log": text("step:1 - " + "a:1 - " * 200_000 + "\n"),
        "log_dashes.log": text("step:1 - " + " - " * 80_000 + "\n"),
        "log_quotes.log": text(("{'epoch': " + "'" * 200_000 + "}\n") * 5),
        "log_pairs.log": text("{'epoch': 1, " + "'a': 1, " * 30_000 + "}\n"),
        "log_braces.log": text("{'" * 2_000_000 + "\n"),
        "log_colours.log": text("\x1b[" * 2_000_000 + "\nstep:1 - entropy:1\n"),
        "log_colour.log": text("\x1b[" + "0" * 3_000_000 + "\nstep:1 - entropy:1\n"),
        "log_returns.log": text("\r" * 5_000_000 + "\nstep:1 - entropy:1\n"),
        "log_endless.log": text("step:1 - entropy:1\n" + "x" * 30_000_000),
        "log_escapes.log": text(f"step:1 - entropy:1 - {ESCAPES}:1 - reward:{ESCAPES}\n"),
        "log_other.db": text(b"x" * 100_000),
        "log_header.db": text(b"SQLite format 3\0" + b"\xff" * 100_000),
        "log_damaged.db": damaged_database,
        "log_view.db": _database(
            f"CREATE VIEW metrics AS {endless} SELECT i AS id, 'r' AS run_name, i AS step, '' AS metrics FROM n"
        ),
        "log_computed.db": _database(f"{computed}; INSERT INTO metrics (run_name, step) VALUES ('r', 1)"),
        "log_huge_text.db": _database(f"{table}; {put} ('r', 1, hex(zeroblob(3000000)))"),
        "log_huge_name.db": _database(f"{table}; {put} (hex(zeroblob(300000)), 1, '{{}}')"),
        "log_escapes.db": _database(f"{table}; {put} ('{quote}', 1, '{{\"entropy\": 1}}'), ('b', 2, '{{\"entropy\": 1}}')"),
        "log_trigger.db": _database(
            f"{table}; {put} ('r', 1, '{{\"entropy\": 1}}'); "
            "CREATE TRIGGER t AFTER INSERT ON metrics BEGIN DELETE FROM metrics; END"
        ),
        "log_runs.db": _database(f"{table}; {endless} {put[:-7]} SELECT 'r' || i, 1, '{{}}' FROM n LIMIT 50000"),
        "log_junk.parquet": text(b"PAR1" + b"\xff" * 10_000 + b"PAR1"),
    }  # fmt: skip


def _runs(folder: Path) -> dict[str, dict[str, str | Path | None]]:
    """Folders that look like those of runs: files with this text, links to this path, pipes (None)."""
    secret = folder / "secret.yaml"
    config = yaml.safe_dump({**RUN, "objective": f"{MODULE}:OBJ", "model": str(folder / "model")})
    return {
        "run_link": {"config.yaml": secret, "metrics.jsonl": secret},
        "run_loop": {"config.yaml": folder / "run_loop" / "config.yaml", "metrics.jsonl": ROW},
        "run_device": {"config.yaml": Path("/dev/zero")},
        "run_pipe": {"metrics.jsonl": None},
        "run_code": {
            "config.yaml": config, "metrics.jsonl": ROW,
            "samples.jsonl": json.dumps({"stage": ESCAPES, "prompt": "<b>", "completions": [ESCAPES], "rewards": [1]}) + "\n",
            "env.json": json.dumps({"command": ESCAPES, "versions": {ESCAPES: "1"}, "seconds": 1.0, "device": "cpu"}),
            "evaluation.json": json.dumps({"before": {ESCAPES: 1.0}, "after": {ESCAPES: 1.0}, "prompts": 1, "samples": 1}),
        },
        "run_empty_log": {"metrics.jsonl": "", "config.yaml": yaml.safe_dump(RUN)},
    }  # fmt: skip


def _make_runs(folder: Path) -> None:
    for name, files in _runs(folder).items():
        run = folder / name
        run.mkdir()
        for file, content in files.items():
            if content is None:
                os.mkfifo(run / file)
            elif isinstance(content, Path):
                (run / file).symlink_to(content)
            else:
                (run / file).write_text(content, encoding="utf-8")


def _special(folder: Path) -> dict[str, Path]:
    """No regular files, and names that a terminal acts on."""
    files = ("pipe.yaml", "pipe.pt", "folder.yaml", "folder_loop", *_links(folder))
    return {
        **{name.replace(".", "_"): folder / name for name in files},
        "deep_loop": folder / "folder_loop" / "/".join(["loop"] * 30),
        "name": folder / f"name{NAME}.yaml",
        "memory": Path("/proc/self/mem"),
    }


def _links(folder: Path) -> dict[str, Path]:
    return {
        "zero.yaml": Path("/dev/zero"), "random.jsonl": Path("/dev/urandom"), "memory.pt": Path("/proc/self/mem"),
        "full.safetensors": Path("/dev/full"), "terminal.jsonl": Path("/dev/tty"), "kcore.npz": Path("/proc/kcore"),
        "secret_link.yaml": folder / "secret.yaml", "secret_link.sh": folder / "secret.yaml",
        "loop.yaml": folder / "loop.yaml", "dangling.yaml": folder / "nowhere",
    }  # fmt: skip


def _make_special(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    os.mkfifo(folder / "pipe.pt")
    for name, target in _links(folder).items():
        (folder / name).symlink_to(target)
    (folder / "folder.yaml").mkdir()
    (folder / "folder_loop").mkdir()
    (folder / "folder_loop" / "loop").symlink_to(folder / "folder_loop")
    (folder / f"name{NAME}.yaml").write_text("a: 1\n")
