"""Pairs of one's own: in the form of the held-out prompts, none of them measured later, none cut, and bad rows counted."""

import json

import pytest
from datasets import Dataset

from bandpo.toy.models import build_tokenizer
from bandpo.train.data import load_pairs, load_prompts

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def plain():
    return build_tokenizer()


@pytest.fixture
def chat():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def file(folder, rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(n, prompt="{}+1="):
    return [{"prompt": prompt.format(i), "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(n)]


def user(content, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": content}]


def said(content):
    return [{"role": "assistant", "content": content}]


def held(*prompts):
    return Dataset.from_list([{"prompt": p, "answer": "1"} for p in prompts])


OTHER = held("9*9=")


def load(name, held_out, tokenizer, **options):
    return load_pairs(name, split="train", held_out=held_out, tokenizer=tokenizer, **options)


def test_text_stays_text_where_text_is_measured(tmp_path, plain):
    data = load(file(tmp_path, text(3)), OTHER, plain)
    assert [dict(row) for row in data] == text(3)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_text_pairs_have_the_form_in_which_prompts_are_measured(system, tmp_path, plain, chat):
    """The same text as a prompt and as a pair's prompt comes out the same, with and without a chat template."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "7+7=", "answer": "14"}\n')
    for tokenizer in (plain, chat):
        common = {"config": None, "split": "train", "prompt_column": "prompt", "answer_column": "answer"}
        measured = load_prompts(
            str(tmp_path / "prompts.jsonl"), system_prompt=system, chat=tokenizer.chat_template is not None, **common
        )
        data = load(file(tmp_path, text(2, "{}+7=")), measured, tokenizer, system_prompt=system)
        expected = measured["prompt"][0]
        found = data["prompt"][0]
        assert json.loads(json.dumps(found).replace("0+7=", "7+7=")) == expected
        assert data["chosen"][0] == (said("1") if tokenizer.chat_template else "1")


def test_messages_are_kept_and_an_implicit_prompt_is_found(tmp_path, chat):
    rows = [{"prompt": user("1+1="), "chosen": said("2"), "rejected": said("3")}]
    data = load(file(tmp_path, rows), held(user("9*9=")), chat)
    assert data["prompt"][0] == user("1+1=") and data["chosen"][0] == said("2")
    rows = [{"chosen": user("1+1=") + said("2"), "rejected": user("1+1=") + said("3")}]
    data = load(file(tmp_path, rows), held(user("9*9=")), chat)
    assert data["prompt"][0] == user("1+1=") and data["rejected"][0] == said("3")


def test_an_implicit_prompt_of_text_is_found_without_a_template(tmp_path, plain):
    data = load(file(tmp_path, [{"chosen": "1+1=2", "rejected": "1+1=3"}]), OTHER, plain)
    assert data["prompt"][0].strip() == "1+1=" and data["chosen"][0].strip() == "2"


@pytest.mark.parametrize(
    ("rows", "held_out", "system", "message"),
    [
        ([{"chosen": "1+1=2", "rejected": "1+1=3"}], held(user("9*9=")), None, "without a column 'prompt'"),
        ([{"prompt": user("1"), "chosen": said("2"), "rejected": said("3")}], OTHER, None, "is evaluated on text"),
        ([{"prompt": "1+1=", "chosen": said("2"), "rejected": said("3")}], held(user("9")), None, "of one kind"),
        ([{"prompt": user("1"), "chosen": "2", "rejected": "3"}], held(user("9")), None, "of one kind"),
        (
            [{"prompt": user("1"), "chosen": said("2"), "rejected": said("3")}], held(user("9", "Be brief.")), "Be brief.",
            "system prompt None, the held-out prompts 'Be brief.'",
        ),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_measured_in_their_form_are_refused(rows, held_out, system, message, tmp_path, chat):
    with pytest.raises(ValueError, match=message):
        load(file(tmp_path, rows), held_out, chat, system_prompt=system)


def test_messages_need_a_template(tmp_path, plain):
    rows = [{"prompt": user("1"), "chosen": said("2"), "rejected": said("3")}]
    with pytest.raises(ValueError, match="the model has no chat template"):
        load(file(tmp_path, rows), OTHER, plain)


BAD = [
    ({"prompt": "9*9=", "chosen": "1", "rejected": "2"}, "have a held-out prompt, on which the run is evaluated"),
    ({"prompt": "1+5=", "chosen": "6", "rejected": "6"}, "have the same text as chosen and as rejected"),
    ({"prompt": "1+5=", "chosen": "6666666666", "rejected": "1"}, "are longer than 12 tokens"),
    ({"prompt": "1+5+5+5+5+5=", "chosen": "6", "rejected": "1"}, "are longer than 12 tokens"),
    ({"prompt": "1+5=", "chosen": "", "rejected": "1"}, "have no 'chosen'"),
    ({"prompt": "1+5=", "chosen": "6", "rejected": None}, "have no 'rejected'"),
    ({"prompt": "", "chosen": "6", "rejected": "1"}, "have no 'prompt'"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_refused_or_left_out_with_a_count(row, message, tmp_path, plain):
    name = file(tmp_path, [*text(3), row, row])
    with pytest.raises(ValueError, match=rf"2 rows {message}.*the first is row 4.*bad_rows: skip"):
        load(name, OTHER, plain, limit=12)
    lines = []
    data = load(name, OTHER, plain, limit=12, skip_bad=True, say=lines.append)
    assert len(data) == 3 and len(lines) == 1 and "2 rows" in lines[0] and "3 are kept" in lines[0]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_all_rows_bad_is_an_error_in_any_case(row, message, tmp_path, plain):
    with pytest.raises(ValueError, match=f"4 rows {message}.*none is left"):
        load(file(tmp_path, [row] * 4), OTHER, plain, limit=12, skip_bad=True)


def test_held_out_prompts_are_found_in_the_chat_form_too(tmp_path, chat):
    name = file(tmp_path, text(3))
    with pytest.raises(ValueError, match="1 rows have a held-out prompt"):
        load(name, held(user("2+1=", "S")), chat, system_prompt="S")
    assert len(load(name, held(user("22+1=", "S")), chat, system_prompt="S")) == 3


def test_lengths_are_those_that_trl_trains_on(tmp_path, plain, chat):
    """At the limit a pair passes, one below it does not: counted by TRL's own preparation."""
    from trl import DPOConfig, DPOTrainer

    from bandpo.toy.models import WarmUp, build_model

    for tokenizer, held_out in ((plain, OTHER), (chat, held(user("9")))):
        name = file(tmp_path, text(1))
        data = load(name, held_out, tokenizer)
        args = DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None
        )
        model, reference = (build_model(WarmUp(hidden_size=32, layers=1, seed=s), tokenizer) for s in (0, 1))
        trainer = DPOTrainer(
            model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer
        )
        row = trainer.train_dataset[0]
        n = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert len(load(name, held_out, tokenizer, limit=n)) == 1
        with pytest.raises(ValueError, match=f"1 rows are longer than {n - 1} tokens"):
            load(name, held_out, tokenizer, limit=n - 1)
