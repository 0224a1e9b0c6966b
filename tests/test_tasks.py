"""Zero-shot tasks: the requests and figures are lm-eval's, whether rows are local or the hub's."""

import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from test_cli import run

from quip import load_model, quantize_model, save_model, tasks
from quip.errors import QuipError
from quip.loading import find_model

try:
    import lm_eval.tasks
except ImportError:
    lm_eval = None
needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="lm-eval is not installed")

WORDS = [
    "salt",
    "a rope",
    "the tide",
    "{{ gold }}",
    'a "quoted" stone',
    "naïve ice",
    "two\nlines",
    "['list']",
    "7",
    "it's",
]


def words(i, count):
    """Some of `WORDS`, all different, another selection for each i."""
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(i)).tolist()
    return [WORDS[k] for k in order[:count]]


def rows(name, count=30):
    """Invented rows, as local files have them and as the hub does."""
    return [make_row(name, i) for i in range(count)]


def make_row(name, i):
    if name == "lambada_openai":
        context, last = ", ".join(words(i, 4)) + (" " if i % 5 == 0 else ""), chr(ord("a") + i % 26)
        return {"context": context, "continuation": last}, {"text": f"{context} {last}"}
    if name == "piqa":
        goal, first, second = words(i, 3)
        both = {"goal": goal, "sol1": first, "sol2": second, "label": i % 2}
        return both, both
    question, *choices = words(i, 4 + i % 3)
    labels = ["1", "2", "3", "4", "5"] if i % 4 == 0 else ["A", "B", "C", "D", "E"]
    gold = i % len(choices)
    local = {"id": f"row{i}", "question": question, "choices": choices, "gold": gold}
    hub_choices = {"text": choices, "label": labels[: len(choices)]}
    return local, {"id": f"row{i}", "question": question, "choices": hub_choices, "answerKey": labels[gold]}


def write_rows(folder, kind, count=30):
    """A file for each task in `folder/zeroshot`, of local rows (kind 0) or the hub's (1)."""
    (folder / "zeroshot").mkdir(parents=True)
    for name, (_, file, _) in tasks.TASKS.items():
        lines = [json.dumps(pair[kind], ensure_ascii=False) + "\n" for pair in rows(name, count)]
        (folder / "zeroshot" / file).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = write_rows(tmp_path / "data", 0)
    monkeypatch.setenv("QUIP_DATA", str(folder))
    return folder


@given(st.text(), st.text(st.characters(exclude_characters=" "), min_size=1))
def test_a_lambada_row_is_cut_where_it_was_joined(context, continuation):
    text = tasks.lambada_row({"context": context, "continuation": continuation})["text"]
    assert (" ".join(text.split(" ")[:-1]), text.split(" ")[-1]) == (context, continuation)
    assert tasks.lambada_row({"text": text}) == {"text": text}


@given(st.text(), st.lists(st.text(), min_size=1, max_size=8), st.data())
def test_an_arc_row_keeps_its_answer(question, choices, draw):
    gold = draw.draw(st.integers(0, len(choices) - 1))
    row = tasks.arc_row({"id": "x", "question": question, "choices": choices, "gold": gold})
    assert row["choices"]["label"].index(row["answerKey"]) == gold
    assert (row["question"], row["choices"]["text"]) == (question, choices)
    assert tasks.arc_row(row) == row


BAD_ROWS = {
    "lambada_openai": [
        ({"context": "a"}, "needs 'continuation'"),
        ({"context": "a", "continuation": "two words"}, "not one word"),
        ({"context": "a", "continuation": ""}, "not one word"),
    ],
    "piqa": [
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "needs 'label'"),
        ({"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, "neither 0 nor 1"),
        ("a string", "no row of piqa"),
        (None, "no row of piqa"),
    ],
    "arc_easy": [
        ({"question": "a", "choices": ["b", "c"], "gold": 2}, "none of the choices"),
        ({"question": "a", "choices": ["b", "c"], "gold": -1}, "none of the choices"),
        ({"question": "a", "choices": ["b", "c"], "gold": None}, "none of the choices"),
        ({"question": "a", "choices": {"text": ["b"], "label": ["A", "B"]}, "answerKey": "B"}, "none of the choices"),
        ({"choices": ["b", "c"], "gold": 0}, "needs 'question'"),
    ],
}


@pytest.mark.parametrize(("name", "row", "said"), [(name, *bad) for name, bads in BAD_ROWS.items() for bad in bads])
def test_a_bad_row_is_named_by_file_and_line(name, row, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(x) for x in (make_row(name, 0)[0], row)), encoding="utf-8")
    with pytest.raises(QuipError, match=f"rows.jsonl, line 2: .*{said}"):
        tasks.read_rows(name, file)


def test_bad_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"goal": \n')
    (tmp_path / "b.jsonl").write_text("\n\n")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\xfd")
    for name, words in {
        "a": "a.jsonl, line 1",
        "b": "b.jsonl has no rows",
        "c": "as UTF-8",
        "d": "cannot read",
    }.items():
        with pytest.raises(QuipError, match=words):
            tasks.read_rows("piqa", tmp_path / f"{name}.jsonl")


def test_a_line_ends_at_a_newline_only(tmp_path):
    row = {"goal": "a\u2028b", "sol1": "c", "sol2": "d\x85", "label": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert tasks.read_rows("piqa", tmp_path / "a.jsonl") == [row]


def test_without_lm_eval_one_line_says_what_to_install(data, model_folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run(capsys, "eval", model_folder, "--tasks", "piqa")
    assert status == 2 and err.count("\n") == 1
    assert 'zero-shot tasks need lm-eval: pip install "quip-llm[tasks]"' in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "piqa,hellaswag"], "unknown task 'hellaswag': choose of lambada_openai, piqa, arc_easy, arc_ch"),
        (["--tasks", ""], "unknown task ''"),
        (["--tasks", "piqa", "--limit", 0], "--limit and --batch-size must be at least 1, got 0 and 8"),
        (["--tasks", "piqa", "--batch-size", 0], "--limit and --batch-size must be at least 1, got None and 0"),
        (["--tasks", "piqa", "--max-tokens", 100], "--seq-len and --max-tokens are for perplexity"),
        (["--tasks", "piqa", "--seq-len", 100], "--seq-len and --max-tokens are for perplexity"),
        (["--limit", 5], "--limit and --batch-size are for --tasks"),
        (["--batch-size", 5], "--limit and --batch-size are for --tasks"),
    ],
)
def test_bad_arguments(more, said, data, capsys):
    status, _, err = run(capsys, "eval", "no/such-model", *more)
    assert status == 2 and said in err and err.count("\n") == 1 and err.startswith("quip: error: ")


@pytest.fixture(scope="module")
def manager():
    return tasks.task_manager()


@pytest.fixture
def hub(monkeypatch):
    """A hub that has all splits of all four data sets, with the same rows in each. Returns what was asked of it."""
    import datasets

    asked = []
    names = {(None, "baber/piqa"): "piqa", ("default", "EleutherAI/lambada_openai"): "lambada_openai"}
    names |= {("ARC-Easy", "allenai/ai2_arc"): "arc_easy", ("ARC-Challenge", "allenai/ai2_arc"): "arc_challenge"}

    def load_dataset(path, name=None):
        asked.append(path)
        split = datasets.Dataset.from_list([row for _, row in rows(names[name, path])])
        return datasets.DatasetDict({key: split for key in ("train", "validation", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def requests(task):
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [(x.request_type, x.arguments, x.idx, x.doc_id, x.repeats) for x in task.instances]


@needs_lm_eval
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_local_rows_give_the_requests_and_scores_of_lm_eval(name, kind, manager, hub, tmp_path):
    theirs = manager.load([name])["tasks"][name]
    assert len(hub) == 1
    (ours,) = tasks.load_tasks([name], write_rows(tmp_path, kind))
    assert len(hub) == 1 and ours.source == f"zeroshot/{tasks.TASKS[name][1]}"
    assert requests(ours.task) == requests(theirs)
    assert len({x[1] for x in requests(ours.task)}) > 29

    pairs = list(zip(ours.task.eval_docs, theirs.eval_docs, strict=True))
    assert [ours.task.doc_to_target(a) for a, _ in pairs] == [theirs.doc_to_target(b) for _, b in pairs]
    g = torch.Generator().manual_seed(0)
    for a, b in pairs:
        count = 1 if name == "lambada_openai" else len(ours.task.doc_to_choice(a))
        found = [(x, x > -1) for x in (-5 * torch.rand(count, generator=g)).tolist()]
        assert ours.task.process_results(a, found) == theirs.process_results(b, found)
    assert ours.task.aggregation() == theirs.aggregation()

    a, b = ours.task.dump_config(), theirs.dump_config()
    different = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {"metadata", "custom_dataset"}
    assert different <= {"training_split", "validation_split", "test_split"}


@needs_lm_eval
def test_without_local_rows_the_hub_is_asked(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("QUIP_DATA", raising=False)
    (tmp_path / "zeroshot").mkdir()
    for data in (None, tmp_path):
        loaded = tasks.load_tasks(["piqa", "arc_easy"], data)
        assert [x.source for x in loaded] == ["baber/piqa, validation", "allenai/ai2_arc, test"]
    assert requests(loaded[0].task)[0] == requests(tasks.load_tasks(["piqa"], write_rows(tmp_path / "b", 0))[0].task)[0]


@needs_lm_eval
def test_without_rows_one_line_names_the_file(model_folder, hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import HfApi, constants

    def unreachable(*args, **kwargs):
        raise ConnectionError("no way to\nthe hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.delenv("QUIP_DATA", raising=False)
    status, _, err = run(capsys, "eval", model_folder, "--tasks", "arc_easy")
    assert status == 2 and err.count("\n") == 1 and hub == []  # load_dataset, which retries, is not even tried
    assert "no rows for arc_easy: there is no QUIP_DATA/zeroshot/arc_easy_test.jsonl (QUIP_DATA is not set)" in err
    assert "the hub cannot be had: no way to" in err
    monkeypatch.setenv("QUIP_DATA", str(tmp_path))
    _, _, err = run(capsys, "eval", model_folder, "--tasks", "arc_easy")
    assert f"there is no {tmp_path / 'zeroshot/arc_easy_test.jsonl'}" in err
    monkeypatch.setenv("QUIP_DATA", str(tmp_path / "nowhere"))
    _, _, err = run(capsys, "eval", model_folder, "--tasks", "arc_easy")
    assert "(QUIP_DATA) is not there" in err


def lm_evals_own(model_args, folder, data, batch_size, **options):
    """The figures of lm-eval, left to load model and rows itself: its definitions, but of JSON files."""
    root = lm_eval.tasks.__path__[0]
    folder.mkdir()
    for name, (where, file, _) in tasks.TASKS.items():
        split = "validation" if name == "piqa" else "test"
        lines = [f"include: {root}/{where}/{name}.yaml", f"task: {name}", "dataset_path: json", "dataset_name: null"]
        lines += [f"dataset_kwargs: {{data_files: {{{split}: {data / 'zeroshot' / file}}}}}"]
        lines += [f"{other}_split: null" for other in ("training", "validation", "test") if other != split]
        (folder / f"{name}.yaml").write_text("\n".join(lines))
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
    more = {"batch_size": batch_size, "device": "cpu", "task_manager": manager, **options}
    with pytest.MonkeyPatch.context() as m:
        m.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds of asking the system
        return lm_eval.simple_evaluate("hf", model_args, list(tasks.TASKS), **more)["results"]


@needs_lm_eval
def test_the_figures_are_those_of_lm_eval(model_folder, data, tmp_path, monkeypatch, capsys, caplog):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    where = {"pretrained": str(model_folder), "dtype": "float32"}
    theirs = lm_evals_own(where, tmp_path / "own", write_rows(tmp_path / "hub", 1), 1, bootstrap_iters=1000)
    caplog.clear()
    capsys.readouterr()

    out = tmp_path / "result.json"
    status, shown, _ = run(capsys, "eval", model_folder, "--tasks", ",".join(tasks.TASKS), "--json", out)
    result = json.loads(out.read_text())
    assert status == 0 and not [x for x in caplog.records if x.name.startswith("lm_eval")]
    assert result.keys() == {"model", "tasks", "limit", "lm_eval"}
    ours = {(row["task"], row["metric"]): row for row in result["tasks"]}
    keys = {(name, key.removesuffix(",none")) for name in theirs for key in theirs[name] if key.endswith(",none")}
    assert ours.keys() == {(name, metric) for name, metric in keys if not metric.endswith("_stderr")}
    assert len(ours) == len(shown.splitlines()) == 8
    for (name, metric), row in ours.items():
        loose = metric == "perplexity"
        assert row["value"] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-6 if loose else 1e-12)
        assert row["stderr"] == pytest.approx(theirs[name][f"{metric}_stderr,none"], rel=0.3 if loose else 1e-12)
        assert (row["documents"], row["source"]) == (30, f"zeroshot/{tasks.TASKS[name][1]}")
        line = next(x for x in shown.splitlines() if x.split()[:2] == [name, metric])
        value, _, stderr, *_ = line.split()[2:]
        assert (float(value), float(stderr)) == pytest.approx((row["value"], row["stderr"]), rel=1e-3)
        assert line.endswith(f" on 30 documents of {row['source']}")
    assert 0 < ours["piqa", "acc"]["value"] < 1
    assert ours["arc_easy", "acc"]["value"] != ours["arc_easy", "acc_norm"]["value"]


@needs_lm_eval
def test_a_quantized_checkpoint_goes_the_same_way(data, tmp_path, token_ids, capsys):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    dense = tasks.evaluate_tasks(model, tokenizer, tasks.TASKS)
    reports = quantize_model(model, token_ids, bits=2)
    save_model(model, tokenizer, tmp_path / "out", reports, {"model": "tiny"})
    loaded, tokenizer = load_model(str(tmp_path / "out"))
    memory, disk = (tasks.evaluate_tasks(x, tokenizer, tasks.TASKS) for x in (model, loaded))
    assert memory[0]["value"] == pytest.approx(disk[0]["value"], rel=1e-3)
    assert memory[0]["value"] != pytest.approx(dense[0]["value"], rel=1e-2)
    file = tmp_path / "result.json"
    status, _, _ = run(capsys, "eval", tmp_path / "out", "--tasks", ",".join(tasks.TASKS), "--json", file)
    assert status == 0 and json.loads(file.read_text())["tasks"] == disk


@needs_lm_eval
def test_perplexity_is_measured_beside_tasks_if_its_text_is_named(model_folder, data, text_file, tmp_path, capsys):
    file = tmp_path / "result.json"
    more = ("--data", text_file, "--seq-len", 64, "--limit", 2, "--batch-size", 3, "--json", file)
    status, out, _ = run(capsys, "eval", model_folder, "--tasks", "piqa, piqa", *more)
    result = json.loads(file.read_text())
    assert status == 0 and "perplexity" in out.splitlines()[0] and len(out.splitlines()) == 3
    assert result["seq_len"] == 64 and result["limit"] == 2
    assert [(row["metric"], row["documents"]) for row in result["tasks"]] == [("acc", 2), ("acc_norm", 2)]


@needs_lm_eval
def test_runs_repeat_whatever_the_batch_and_leave_the_tokenizer(data):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.pad_token = None
    batches = []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    loaded = tasks.load_tasks(["lambada_openai", "arc_challenge"])
    first, again, other = (tasks.run_tasks(model, tokenizer, loaded, 9, size) for size in (4, 4, 1))
    assert max(batches) == 4 and batches[-1] == 1
    assert first == again and tokenizer.pad_token is None
    for a, b in zip(first, other, strict=True):
        assert a | {"value": 0, "stderr": 0} == b | {"value": 0, "stderr": 0}
        assert (a["value"], a["stderr"]) == pytest.approx((b["value"], b["stderr"]), rel=1e-5)
    (one, *_) = tasks.run_tasks(model, tokenizer, loaded, limit=1)
    assert one["stderr"] is None and one["documents"] == 1
    assert logging.getLogger("lm_eval").level == logging.NOTSET


@needs_lm_eval
def test_a_broken_model_has_no_accuracy(data):
    loaded = tasks.load_tasks(["piqa", "lambada_openai"])
    model = tiny_llama()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(QuipError, match="the model's output is NaN on piqa"):
        tasks.run_tasks(model, byte_tokenizer(), loaded, limit=2)
    model.model.norm.weight.data.fill_(1e6)
    with pytest.raises(QuipError, match="larger than any float"):
        tasks.run_tasks(model, byte_tokenizer(), loaded, limit=2)
    for more in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(QuipError, match="at least 1"):
            tasks.run_tasks(model, byte_tokenizer(), loaded, **more)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.skipif("QUIP_DATA" not in os.environ, reason="needs the rows of the tasks in QUIP_DATA")
def test_smollm2_scores_as_in_lm_eval(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub/zeroshot").mkdir(parents=True)
    for name, (_, file, _) in tasks.TASKS.items():
        of_hub = tasks.read_rows(name, Path(os.environ["QUIP_DATA"], "zeroshot", file))
        (tmp_path / "hub/zeroshot" / file).write_text("".join(json.dumps(row) + "\n" for row in of_hub))
    folder, more = find_model("smollm2")
    where = {"pretrained": folder, "dtype": "float32", **more}
    theirs = lm_evals_own(where, tmp_path / "own", tmp_path / "hub", 8, limit=50, bootstrap_iters=0)
    for row in tasks.evaluate_tasks(*load_model("smollm2"), tasks.TASKS, limit=50):
        print(row, theirs[row["task"]][f"{row['metric']},none"])
        assert row["value"] == pytest.approx(theirs[row["task"]][f"{row['metric']},none"], rel=1e-6)
        assert row["documents"] == 50
