"""The command line, as a user meets it: results, and one line with status 2 for bad input."""

import json

import pytest
from test_untrusted import CODE, edit_config

from quip.cli import main


def run(capsys, *args):
    """Exit status, stdout, stderr of one command."""
    status = 0
    try:
        main([str(a) for a in args])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def quantize(model_folder, text_file, tmp_path, capsys):
    def go(*more, out=tmp_path / "out"):
        calibration = ("--calib", text_file, "--samples", 8, "--seq-len", 64)
        return run(capsys, "quantize", model_folder, out, "--bits", 2, *calibration, *more)

    return go


def test_quantize_info_eval_generate(quantize, model_folder, text_file, tmp_path, capsys):
    status, out, _ = quantize()
    assert status == 0 and "14 layers in 2 bits" in out

    status, out, _ = run(capsys, "info", tmp_path / "out", "--json", tmp_path / "info.json")
    info = json.loads((tmp_path / "info.json").read_text())
    assert status == 0 and "model.layers.1.mlp.down_proj" in out
    assert info["settings"]["bits"] == 2 and info["settings"]["calibration"] == "file words.txt"
    layer = info["layers"]["model.layers.0.mlp.up_proj"]
    # 88 rows of 6 groups of 2 bytes, a float32 scale, four int64 of seeds and fingerprints
    assert layer["shape"] == [88, 48]
    assert layer["bits_per_weight"] == pytest.approx(8 * (88 * 16 + 4 + 32) / (88 * 48))
    assert 0 < layer["relative_proxy_loss"] < 1
    assert 0 < layer["predicted_loss"] < 1
    for key in ("mu_weights", "mu_hessian", "trace_ratio"):
        assert "→".join(f"{x:.{2 if key == 'trace_ratio' else 1}f}" for x in layer[key]) in out
    weights = 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 88 * 48)
    assert info["totals"]["quantized_weights"] == weights
    assert info["totals"]["other_parameters"] == 257 * 48 + 5 * 48
    assert info["totals"]["file_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size

    for model in (model_folder, tmp_path / "out"):
        status, out, _ = run(
            capsys,
            "eval",
            model,
            "--data",
            text_file,
            "--seq-len",
            128,
            "--max-tokens",
            1000,
            "--json",
            tmp_path / "e.json",
        )
        result = json.loads((tmp_path / "e.json").read_text())
        assert status == 0 and f"{result['ppl']:.3f}" in out
        assert result.keys() == {"model", "data", "tokens", "seq_len", "nll", "ppl", "seconds"}
        assert (result["tokens"], result["seq_len"]) == (7 * 128, 128)

    status, out, _ = run(capsys, "generate", tmp_path / "out", "the quick", "--max-new-tokens", 5)
    assert status == 0 and out.startswith("the quick")


def test_the_same_seed_gives_the_same_bytes(quantize, tmp_path):
    for name in "ab":
        assert quantize("--seed", 3, out=tmp_path / name)[0] == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_an_existing_checkpoint_is_kept_unless_overwriting_is_asked_for(quantize, tmp_path):
    assert quantize()[0] == 0
    before = (tmp_path / "out/model.safetensors").read_bytes()
    status, _, err = quantize("--seed", 5)
    assert status == 2 and "--overwrite" in err
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert quantize("--seed", 5, "--overwrite")[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != before


def test_every_step_has_a_switch(quantize, tmp_path, capsys):
    switches = ("--method", "near", "--incoherence", "none", "--range", 3, "--no-order", "--rescale", "--passes", 1)
    assert quantize(*switches)[0] == 0
    settings = json.loads((tmp_path / "out/quip_report.json").read_text())["settings"]
    expected = {"method": "near", "incoherence": "none", "rho": 3.0, "order": False, "rescale": True, "passes": 1}
    assert expected.items() <= settings.items()
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["incoherence"] == "none" and config["rescale"]
    _, out, _ = run(capsys, "info", tmp_path / "out")
    assert " 3.00 " in out


def test_info_says_where_damping_was_raised(quantize, tmp_path, capsys):
    assert quantize("--alpha", 0, "--samples", 1, "--seq-len", 16)[0] == 0  # 16 tokens, 48 inputs
    _, out, _ = run(capsys, "info", tmp_path / "out")
    assert "model.layers.0.mlp.down_proj: H would not factor; damping raised from 0 to 1e-0" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bits", 5], "bits must be 2, 3 or 4, got 5"),
        (["--bits", 1], "bits must be 2, 3 or 4, got 1"),
        (["--preset", "best"], "unknown preset 'best'"),
        (["--calib", "wikitext3"], "unknown data 'wikitext3'"),
        (["--samples", 1000], "text too short: file words.txt has 6000 tokens, 1000 samples of 64 need 64000"),
        (["--samples", 0], "at least 1"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--seed", -1], "seed"),
        (["--method", "gptq"], "unknown method 'gptq': choose one of near, stoch, ldlq, optq, ldlq-rg, greedy, admm"),
        (["--range", "wide"], "--range must be a number, search or max, got 'wide'"),
        (["--range", 0], "the range rho must be a positive number"),
        (["--passes", -1], "passes must be at least 0"),
        (["--incoherence", "haar"], "incoherence must be 'kron' or 'none'"),
        (["--skip", "*.no_such_layer"], "the pattern '*.no_such_layer' matches no layer"),
        (["--bits-for", "*.down_proj"], "--bits-for takes PATTERN=B such as *.down_proj=4, got '*.down_proj'"),
        (["--bits-for", "*.down_proj=5"], "bits for *.down_proj must be 2, 3 or 4, got 5"),
        (["--seq-len", 300], "sequence length 300 is out of range: this model takes up to 256 tokens"),
    ],
)
def test_bad_arguments_of_quantize(more, words, quantize, tmp_path):
    status, _, err = quantize(*more)
    assert status == 2 and words in err
    assert err.count("\n") == 1 and err.startswith("quip: error: ")
    assert not (tmp_path / "out").exists()


def test_bad_models_folders_and_texts(model_folder, text_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    commands = {
        ("eval", "no/such-model", "--data", text_file): "no/such-model",
        ("eval", tmp_path / "no.gguf", "--data", text_file): "no such file",
        ("eval", tmp_path / "empty", "--data", text_file): "no config.json",
        ("eval", model_folder, "--data", "nothing"): "unknown data 'nothing'",
        ("eval", model_folder, "--data", text_file, "--seq-len", 512): "sequence length 512",
        ("eval", model_folder, "--data", text_file, "--seq-len", 64, "--max-tokens", 9): "--max-tokens 9",
        ("info", tmp_path / "empty"): "not a quip checkpoint",
        ("info", tmp_path / "nowhere"): "not a quip checkpoint",
        ("info", model_folder): "not a quip checkpoint",
        ("generate", tmp_path / "empty", "hello"): "no config.json",
        ("generate", model_folder, ""): "prompt is empty",
        ("generate", model_folder, "hello", "--max-new-tokens", 0): "--max-new-tokens",
    }
    for command, words in commands.items():
        status, _, err = run(capsys, *command)
        line = err.strip().splitlines()[-1]
        assert status == 2 and line.startswith("quip: error: ") and words in line, (command, err)
        assert "Traceback" not in err


def test_a_damaged_checkpoint_is_one_line(quantize, tmp_path, capsys):
    assert quantize()[0] == 0
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for command in (["info", tmp_path / "out"], ["generate", tmp_path / "out", "hello"]):
        status, _, err = run(capsys, *command)
        assert status == 2 and err.startswith("quip: error: ") and err.count("\n") == 1, err


def test_an_interrupted_run_keeps_its_blocks_and_says_how_to_go_on(quantize, tmp_path, monkeypatch):
    from quip import models

    assert quantize(out=tmp_path / "expected")[0] == 0
    calls = []
    original = models.quantize_block

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(models, "quantize_block", interrupted)
    status, _, err = quantize()
    assert (
        status == 130
        and f"interrupted: the blocks that are done (1) are kept in {tmp_path / 'out.part'}; the same" in err
    )
    assert not (tmp_path / "out").exists()
    status, _, err = quantize("--seed", 4)
    assert status == 2 and "seed was 0 and is now 4" in err and "--restart" in err
    assert quantize()[0] == 0 and len(calls) == 3
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert not (tmp_path / "out.part").exists()


def test_restart(quantize, tmp_path, monkeypatch):
    from quip import models

    with monkeypatch.context() as m:
        m.setattr(models.Blocks, "finish", lambda self, *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert quantize()[0] == 130
    assert not (tmp_path / "out.part").exists()  # nothing was done
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/arguments.json").write_text("{}")
    assert quantize()[0] == 2
    assert quantize("--restart")[0] == 0


def test_layers_can_be_left_out_and_have_other_widths(quantize, tmp_path, capsys):
    more = (
        "--skip",
        "*.0.*.k_proj",
        "--skip",
        "*.v_proj",
        "--bits-for",
        "*.down_proj=4",
        "--offload",
        tmp_path / "tmp",
    )
    status, out, _ = quantize(*more)
    assert status == 0 and "11 layers in 2 and 4 bits" in out
    assert list((tmp_path / "tmp").iterdir()) == []
    _, out, _ = run(capsys, "info", tmp_path / "out")
    lines = [line.split() for line in out.splitlines() if ".layers." in line]
    assert {float(line[2]) > 3.9 for line in lines if "down_proj" in line[0]} == {True}
    assert not [line for line in lines if "v_proj" in line[0] or "layers.0.self_attn.k_proj" in line[0]]
    status, _, _ = run(capsys, "generate", tmp_path / "out", "the", "--max-new-tokens", 2)
    assert status == 0


def test_code_that_comes_with_a_model_runs_only_if_asked_for(quantize, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # nobody to answer "run it?"
    (model_folder / "stranger.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    names = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    edit_config(model_folder, lambda config: config.update(model_type="stranger", auto_map=names))
    for status, _, err in (quantize(), run(capsys, "generate", model_folder, "the")):
        assert status == 2 and "custom code" in err and err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert quantize("--trust-remote-code")[0] == 0
    assert (tmp_path / "ran").exists()
