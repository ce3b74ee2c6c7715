"""pilot-sample and pilot-export: what a run leaves is a model that one can use, at the end and before it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import transformers

from nanochat import checkpoint_manager
from nanochat.engine import Sampling
from pilot.app import export, sample
from pilot.storage.snapshots import read_snapshot
from pilot.training.learner import Learner
from tasks.generation import continuation, load_text_model
from tasks.gpt2 import GPT2
from tests.processes import RUN, eventually, quadratic_flags, start_validator
from tests.tiny import CPU, OPTIMIZER, tiny_task

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def run(task: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the models after 3 and 5 rounds, which differ."""
    folder = tmp_path_factory.mktemp("run")
    learner = Learner(task, OPTIMIZER, CPU)
    for rounds in (3, 5):
        with torch.no_grad():
            for p in learner.parameters.values():
                p.mul_(3.0)
        export.save_model(task, learner, rounds, folder, keep=2)
    return folder


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
    from dataclasses import asdict

    from nanochat.config import GPTConfig
    from nanochat.gpt import GPT
    from nanochat.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("nanochat")
    tokenizer = Tokenizer.bytewise()
    shape = GPTConfig(
        sequence_len=64, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32
    )
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)))
    checkpoint_manager.save(
        folder, 7, tensors={"model": model.state_dict()}, meta={"config": asdict(shape), "dtype": "fp32"}
    )
    return folder


def said(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    sample.main([*map(str, flags), "--threads", "1"])
    return capsys.readouterr().out


def test_it_continues_a_prompt_as_hugging_faces_own_generation_does(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("the miner", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False)
    theirs = tokenizer.decode(expected[0], skip_special_tokens=True)
    ours = said(capsys, run, "--prompt", "the miner", "--max-tokens", 20, "--temperature", 0)
    assert ours == theirs + "\n"


@pytest.mark.parametrize("kind", ["run", "nanochat"])
def test_the_same_seed_says_the_same(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(kind)
    flags = (folder, "--prompt", "the rounds", "--max-tokens", 20)
    first, second = said(capsys, *flags, "--seed", 1), said(capsys, *flags, "--seed", 2)
    assert first.startswith("the rounds")
    assert len(first) > len("the rounds\n")
    assert first != second
    assert said(capsys, *flags, "--seed", 1, "--samples", 2) == first + second


def test_it_takes_the_newest_step_or_the_one_that_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt", "the", "--max-tokens", 12, "--temperature", 0)
    newest, older = said(capsys, run, *flags), said(capsys, run, *flags, "--step", 3)
    assert newest == said(capsys, run / "model" / "step_000005", *flags)
    assert older == said(capsys, run / "model" / "step_000003", *flags)
    assert newest != older


def test_a_text_longer_than_the_context_goes_on_from_its_end(run: Path) -> None:
    model = load_text_model(run, CPU)
    prompt = model.encode("the miner " * 10)  # 100 tokens: the model has 32 positions
    text = list(continuation(model, prompt, max_tokens=100, how=Sampling(), seed=0))
    assert len("".join(text)) >= 25  # of 100 bytes, four at most make a character


def test_standard_input_is_a_prompt(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the miner"))
    assert said(capsys, run, "--max-tokens", 5).startswith("the miner")


def test_a_chat_of_several_turns(
    nanochat: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert said(capsys, nanochat, "--chat", "--max-tokens", 9) != "\n"
    model = load_text_model(nanochat, CPU)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert model.decode(model.render(turns)).endswith("<|user_start|>c<|user_end|><|assistant_start|>")


def test_a_chat_template_of_hugging_face(run: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(tmp_path)
    model = load_text_model(tmp_path, CPU)
    assert model.decode(model.render([{"role": "user", "content": "hi"}])) == "[user]hi[assistant]"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--model: name the folder of a run, such as runs/demo, or of a model"),
        (["nowhere"], "--model nowhere: no such folder; name a run's, such as runs/demo, or a model's"),
        (["RUN", "--step", "4"], "--model RUN/model: no checkpoint of step 4; there are 3, 5"),
        (["RUN", "--chat"], "the model's tokenizer has no chat template; continue a --prompt instead"),
        (["RUN", "--chat", "--prompt", "a"], "--chat: reads what you say from standard input; leave --prompt out"),
        (["RUN", "--temperature", "-1"], "--temperature -1.0: must be 0 or more, and finite"),
        (["RUN", "--max-tokens", "0"], "--max-tokens 0: must be 1 or more"),
        (["OTHER"], "--model OTHER: holds no language model, so there is no text to continue"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str],
    reason: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    checkpoint_manager.save(tmp_path, 1, tensors={"model": {"w": torch.zeros(3)}}, meta={})
    places = {"RUN": str(run), "OTHER": str(tmp_path)}
    with pytest.raises(SystemExit) as ended:
        sample.main([places.get(flag, flag) for flag in flags])
    assert ended.value.code == 2
    for name, place in places.items():
        reason = reason.replace(name, place)
    assert capsys.readouterr().err == f"pilot-sample: {reason}\n"


def test_base_eval_samples_a_gpt2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import base_eval

    flags = ["--prompts", "the miner", "--max-new-tokens", "9", "--json", str(tmp_path / "out.json"), "--threads", "1"]
    base_eval.main(["--checkpoint", str(run / "model"), *flags])
    assert "bits per byte and CORE are evaluated of nanochat's models only" in capsys.readouterr().out
    [found] = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert len(found["drawn"]) == 2
    flags = ("--prompt", "the miner", "--max-tokens", 9, "--temperature", 0)
    assert said(capsys, run, *flags) == f"the miner{found['likeliest']}\n"
    with pytest.raises(SystemExit):
        base_eval.main(["--checkpoint", str(run / "model"), "--eval", "core"])
    assert "is no nanochat model; --eval sample is for every model" in capsys.readouterr().err


# --- export -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_run_that_goes_on_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--local", "1", "--rounds", "100000", "--snapshot-every", "40", "--snapshot-keep", "3"]
    with start_validator(tmp_path, *flags, task=quadratic_flags) as process:
        run = tmp_path / "runs" / RUN
        place = run / "snapshots"
        eventually(lambda: (place / "00000040.safetensors").exists(), "a snapshot")
        export.main([str(run)])
        made = Path(capsys.readouterr().out.removeprefix("model in ").strip())
        assert made.parent == run / "exported"
        assert all(t.isfinite().all() for t in checkpoint_manager.load(made).tensors().values())
        newest = max(int(path.stem) for path in place.glob("*.safetensors"))
        with pytest.raises(SystemExit):
            export.main([str(run), "--round", "7"])
        assert f"pilot-export: --round: {place}: no snapshot of round 7; there are those of" in capsys.readouterr().err
        export.main([str(run), "--round", str(newest), "--out", str(tmp_path / "mine")])
        snapshot = read_snapshot(place, newest)
        exported = checkpoint_manager.load(tmp_path / "mine")
        assert exported.step == newest
        assert all(torch.equal(t, snapshot.tensors[f"model/{name}"]) for name, t in exported.tensors().items())
        after = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["round"]
        eventually(
            lambda: json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["round"] > after, "further rounds"
        )
        process.terminate()
        assert process.wait() == 0
    assert checkpoint_manager.load(run / "model").step >= newest


def test_an_exported_gpt2_is_one_for_hugging_face(task: GPT2, tmp_path: Path) -> None:
    run = tmp_path / "run"
    learner = Learner(task, OPTIMIZER, CPU)
    export.save_description(task, run)
    from pilot.storage.snapshots import Snapshots

    Snapshots(run / "snapshots", keep=2).save(4, *learner.state())
    folder = export.export(run, None, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in learner.parameters.items())
    assert transformers.AutoTokenizer.from_pretrained(folder)("the")["input_ids"] == list(b"the")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--run: name a run's folder, such as runs/demo"),
        (["PLACE"], "--run PLACE: not a run's folder; name one of runs/"),
        (["PLACE/old"], "--run PLACE/old: was begun by an older release: resume it once"),
        (["PLACE/new"], "--round: PLACE/new/snapshots: holds no snapshot"),
        (["PLACE/new", "--out", "PLACE"], "--out PLACE: holds other files; name a new folder"),
    ],
)
def test_a_mistaken_export_is_one_line(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old" / "snapshots").mkdir(parents=True)
    (tmp_path / "new" / "model_files").mkdir(parents=True)
    (tmp_path / "new" / "model_files" / "meta.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        export.main([flag.replace("PLACE", str(tmp_path)) for flag in flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"pilot-export: {reason.replace('PLACE', str(tmp_path))}\n"
