"""GPT-2s from folders and out of runs: damaged weights are refused, and what is exported works elsewhere as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HubLibrary

from nanochat import checkpoint_manager
from protocol import ProtocolError
from tasks.data.hub_tokenizer import own_tokenizer
from tasks.data.tokenizer import BPETokenizer, ByteTokenizer, HubTokenizer, RustTokenizer, Tokenizer, load_tokenizer
from tasks.gpt2 import GPT2, GPT2Config
from tasks.gpt2_files import exported
from tests.test_text import data_file

TEXT = "der Fluss am Morgen ist kühl,\n  und 1234 Boote don't wait… naïve 日本\n\n" * 40
TENSOR = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16, "vocab_size": 300}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    return folder


def prepare(model: Path | str, place: Path, text: str = TEXT, **flags) -> GPT2:
    place.mkdir(exist_ok=True)
    (place / "a.txt").write_text(text)
    given = {"seq_len": 8, "batch_size": 2, "validation": 0.1, "tokenizer": "byte"} | flags
    config = GPT2Config(model=str(model), text=str(place / "a.txt"), **given)
    return GPT2.prepare(config, seed=0, cache=place / "cache")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


# --- weights ----------------------------------------------------------------------------------------------------------


def compiled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"_orig_mod.{key}": tensor for key, tensor in weights.items()}


def distributed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": tensor for key, tensor in weights.items()}


def both(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"_orig_mod.module.{key}": tensor for key, tensor in weights.items()}


def inner(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As of a model that was sharded, or compiled, block by block."""
    return {key.replace("h.0.", "h.0._fsdp_wrapped_module._orig_mod."): tensor for key, tensor in weights.items()}


def bare(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As GPT2Model's, and the hub's gpt2, which also holds masks."""
    plain = {key.removeprefix("transformer."): tensor for key, tensor in weights.items()}
    return {**plain, "h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}


def lightning(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{key}": tensor for key, tensor in weights.items()}


def with_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("renamed", [compiled, distributed, both, inner, bare, lightning, with_head])
def test_a_wrappers_prefixes_do_not_hide_the_weights(
    saved: Path, tmp_path: Path, renamed: Callable, pickled: bool
) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    weights = weights_of(saved)
    if pickled:
        torch.save(renamed(weights), tmp_path / "pytorch_model.bin")
    else:
        save_file(renamed(weights), tmp_path / "model.safetensors")
    model = prepare(tmp_path, tmp_path / "place").build_model("cpu", initial=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        weights = weights_of(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def pickled(value: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(value, bytes):
            (folder / "pytorch_model.bin").write_bytes(value)
        else:
            torch.save(value, folder / "pytorch_model.bin")

    return apply


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_pickle(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "w")
    pickled((folder / "w").read_bytes()[:3000])(folder)


def a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")


def sharded(shard: str, remove: bool = False) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        weights = weights_of(folder)
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        index = {"weight_map": dict.fromkeys(weights, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def index_of(text: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return apply


class Foreign:
    """Its pickle names a class that weights have no need of."""


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("layer missing", changed(lambda w: w.pop(TENSOR)), f"lack {TENSOR}"),
    ("table missing", changed(lambda w: w.pop("transformer.wte.weight")), "lack lm_head.weight and 1 more"),
    ("empty", changed(dict.clear), "and 1"),
    ("unknown", changed(lambda w: w.update({"score.weight": torch.ones(2)})), "score.weight is not of a GPT-2"),
    ("another shape", changed(lambda w: w.update({TENSOR: torch.ones(8, 8)})), r"\(8, 8\), by config.json it is"),
    ("NaN", changed(lambda w: w[TENSOR].fill_(float("nan"))), f"{TENSOR} holds NaN"),
    ("infinite", changed(lambda w: w[TENSOR][0].fill_(float("inf"))), f"{TENSOR} holds NaN or infinity"),
    ("quantised", changed(lambda w: w.update({TENSOR: w[TENSOR].to(torch.int8)})), "torch.int8"),
    ("twice", changed(lambda w: w.update({f"module.{TENSOR}": w[TENSOR] + 1})), "twice"),
    ("other head", changed(lambda w: w.update({"lm_head.weight": torch.ones(300, 8)})), "tie_word_embeddings"),
    ("cut short", cut, r"model.safetensors: cut short or damaged"),
    ("zero bytes", lambda folder: (folder / "model.safetensors").write_bytes(b""), "cut short or damaged"),
    ("text", lambda folder: (folder / "model.safetensors").write_text("<html>"), "cut short or damaged"),
    (
        "pointer",
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x"),
        "Git LFS pointer.*git lfs pull",
    ),
    ("bin pointer", pickled(b"version https://git-lfs.github.com/spec/v1\noid x"), "Git LFS pointer"),
    ("a folder", a_folder, "Is a directory"),
    ("dangling link", gone, "No such file"),
    ("no file", lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors or pytorch_model.bin"),
    ("bin cut short", cut_pickle, "pytorch_model.bin: cut short or damaged"),
    ("bin of bytes", pickled(b"\x80\x02 nothing"), "pytorch_model.bin: cut short or damaged"),
    ("bin of nothing", pickled(b""), "pytorch_model.bin: cut short or damaged"),
    ("bin of an object", pickled(Foreign()), "Python objects besides tensors"),
    ("bin of a list", pickled([torch.ones(1)]), "not tensors by name"),
    ("bin of a trainer", pickled({"state_dict": {}, "epoch": 3}), "not tensors by name"),
    ("shard missing", sharded("two.safetensors"), "two.safetensors, which is not there"),
    ("shard elsewhere", sharded("../one.safetensors"), "which is not there"),
    ("index of null", index_of("null"), "not a JSON object"),
    ("index cut", index_of('{"weight_map": {'), "not JSON"),
    ("index of a list", index_of('{"weight_map": []}'), "no weight_map"),
]


@pytest.mark.parametrize(("damage", "line"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damaged_weights_are_refused_in_a_line(saved: Path, tmp_path: Path, damage: Callable, line: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    task = prepare(folder, tmp_path / "place")
    with pytest.raises(ValueError, match=line) as refused:
        task.build_model("cpu", initial=True)
    assert str(refused.value).startswith(f"--gpt2.model {folder}: ")
    assert "\n" not in str(refused.value)


def test_shards_and_half_precision_are_read(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in weights_of(folder).items()}
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({key: weights[key] for key in part}, folder / f"{number}.safetensors")
    index = {"weight_map": {key: f"{i % 2}.safetensors" for i, key in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    state = prepare(folder, tmp_path / "place").build_model("cpu", initial=True).state_dict()
    assert all(torch.equal(state[key], tensor.float()) for key, tensor in weights.items())


@pytest.mark.parametrize(
    "body",
    ["null", "[]", "", "\xff\x00", "version https://git-lfs.github.com/spec/v1", '"gpt2"', '{"n_layer": 1'],
)
def test_a_damaged_configuration_is_refused_in_a_line(saved: Path, tmp_path: Path, body: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "config.json").write_bytes(body.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json: not the configuration of a model") as refused:
        prepare(folder, tmp_path / "place")
    assert str(refused.value).startswith(f"--gpt2.model {folder}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_layer", "two"), ("n_layer", None), ("n_layer", -1), ("n_embd", 0), ("n_inner", "x"), ("n_head", 3)),
        *(("vocab_size", 1.5), ("model_type", "gpt2x"), ("model_type", 3), ("activation_function", None)),
        ("dtype", "float7"),
    ],
)
def test_impossible_sizes_are_refused_in_a_line(saved: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=r"^--gpt2\.model ") as refused:
        prepare(folder, tmp_path / "place")
    assert "\n" not in str(refused.value)


# --- a model's own tokenizer ------------------------------------------------------------------------------------------


def train_tokenizer(special: str = "<|endoftext|>") -> HubLibrary:
    tokenizer = HubLibrary(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[special], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def give(folder: Path, tokenizer: HubLibrary, form: str) -> None:
    if form == "tokenizer.json":
        tokenizer.save(str(folder / form))
    else:
        tokenizer.model.save(str(folder))
        names = form.split()
        (folder / "vocab.json").rename(folder / names[0])
        (folder / "merges.txt").rename(folder / names[1])


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json merges.txt", "encoder.json vocab.bpe"])
def test_a_model_is_fed_its_own_tokenizers_ids(saved: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    tokenizer = train_tokenizer()
    give(folder, tokenizer, form)
    task = prepare(folder, tmp_path / "place", tokenizer="auto")
    expected = tokenizer.encode(TEXT).ids
    assert task._tokens.train.tolist() + task._tokens.validation.tolist() == expected
    assert task.data_spec.parameters["tokenizer"] == "bpe"
    named = prepare("small", tmp_path / "other", tokenizer=str(folder))
    assert named.data_digest == task.data_digest
    # a miner that has the text makes the same tokens from the order alone
    [blob] = [data for key, data in task.blobs().items() if key == task.data_spec.blobs["vocabulary"].digest]
    [again] = HubTokenizer(bytes(blob)).encode([TEXT.encode()])
    assert again.tolist() == expected


def test_documents_are_separated_by_the_models_own_token(saved: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("<end>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token that ends a text"):
        own_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert own_tokenizer(str(tmp_path)).separator == tokenizer.token_to_id("<end>")
    begin = [("<end>", tokenizer.token_to_id("<end>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=begin)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert own_tokenizer(str(tmp_path)).leads


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<user>", AddedToken("<bot>", lstrip=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "der <user> Fluss\n <bot> am<user>"
    [ids] = own_tokenizer(str(tmp_path)).encode([text.encode()])
    assert ids.tolist() == tokenizer.encode(text).ids


def test_gpt2s_own_vocabulary_is_the_tokenizer_gpt2(tmp_path: Path) -> None:
    shutil.copy(data_file("gpt2_encoder.json"), tmp_path / "vocab.json")
    shutil.copy(data_file("gpt2_vocab.bpe"), tmp_path / "merges.txt")
    found = own_tokenizer(str(tmp_path))
    assert isinstance(found, BPETokenizer)
    assert found.vocabulary == load_tokenizer("gpt2", tmp_path).vocabulary


@pytest.mark.parametrize(
    ("part", "value", "line"),
    [
        ("model", {"type": "Unigram", "vocab": []}, "not a byte-pair encoding"),
        ("model", None, "not a byte-pair encoding"),
        ("pre_tokenizer", {"type": "Whitespace"}, "does not split text as GPT-2's"),
        ("pre_tokenizer", None, "does not split text as GPT-2's"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "add_prefix_space"),
        ("normalizer", {"type": "Lowercase"}, "changes the text"),
        ("added_tokens", [{"content": 3, "id": "x"}], "vocabulary"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_in_a_line(
    saved: Path, tmp_path: Path, part: str, value: object, line: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    body = json.loads(train_tokenizer().to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**body, part: value}))
    with pytest.raises(ValueError, match=line) as refused:
        prepare(folder, tmp_path / "place", tokenizer="auto")
    assert str(refused.value).startswith(f"--gpt2.model {folder}: {folder}/tokenizer.json: ")
    assert "--gpt2.tokenizer" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_is_not_fed_english_ids(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--gpt2.model .* its vocabulary of 300 is not GPT-2's.*--gpt2.tokenizer"):
        prepare(saved, tmp_path / "place", tokenizer="auto")
    with pytest.raises(ValueError, match=r"^--gpt2.tokenizer .*no tokenizer.json"):
        prepare(saved, tmp_path / "place", tokenizer=str(saved))


@pytest.mark.parametrize("file", ["vocab.json", "encoder.json", "vocab.txt", "spiece.model", "tokenizer.model"])
def test_a_tokenizer_of_another_kind_is_not_replaced_by_gpt2s(tmp_path: Path, file: str) -> None:
    transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path)  # of 50,257 tokens
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"^--gpt2.model .*/{file}: no byte-pair encoding .*--gpt2.tokenizer"):
        prepare(tmp_path, tmp_path / "place", tokenizer="auto")


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["vocab"].update({"a": "1"}),
        lambda parts: parts["vocab"].update({"a": 1 << 20}),
        lambda parts: parts["vocab"].update({"a": -1}),
        lambda parts: parts["vocab"].update({"a": parts["vocab"]["b"]}),
        lambda parts: parts["vocab"].clear(),
        lambda parts: parts["merges"].append(["a", "no such"]),
        lambda parts: parts["merges"].append(["a"]),
        lambda parts: parts["added"].append(["no such", False, False, False]),
        lambda parts: parts.update(separator="x"),
        lambda parts: parts.update(more=1),
    ],
)
def test_an_orders_vocabulary_is_checked(tmp_path: Path, change: Callable) -> None:
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    parts = json.loads(own_tokenizer(str(tmp_path)).vocabulary)
    change(parts)
    with pytest.raises(ProtocolError, match="vocabulary"):
        HubTokenizer(json.dumps(parts).encode())


# --- out of a run -----------------------------------------------------------------------------------------------------


def tokenizers(folder: Path) -> list[tuple[str, Callable[[], Tokenizer]]]:
    def hub() -> Tokenizer:
        train_tokenizer().save(str(folder / "tokenizer.json"))
        found = own_tokenizer(str(folder))
        assert found is not None
        return found

    def rust() -> Tokenizer:
        package = pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
        from nanochat.tokenizer import SPECIAL_TOKENS
        from nanochat.tokenizer import Tokenizer as Inner

        inner = package.Tokenizer()
        inner.train_from_iterator([TEXT], 300, pattern=package.NANOCHAT_PATTERN)
        inner.add_special_tokens(SPECIAL_TOKENS)
        return RustTokenizer(Inner.from_rustbpe(inner).blob)

    def gpt2() -> Tokenizer:
        return load_tokenizer("gpt2", Path(str(data_file("gpt2_encoder.json")).removesuffix("encoder.json")))

    return [("byte", ByteTokenizer), ("bpe", hub), ("rustbpe", rust), ("gpt2", gpt2)]


@pytest.mark.parametrize("kind", ["byte", "bpe", "rustbpe", "gpt2"])
def test_what_is_exported_works_in_auto_classes_and_pipeline_as_it_is(tmp_path: Path, kind: str) -> None:
    tokenizer = dict(tokenizers(tmp_path))[kind]()
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32, "vocab_size": tokenizer.vocab_size}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    files = exported(config, tokenizer)
    if tokenizer.vocabulary:
        files["vocabulary"] = tokenizer.vocabulary
    tensors = {"model": dict(model.named_parameters())}
    folder = checkpoint_manager.save(
        tmp_path / "out", 3, tensors=tensors, meta={"tokenizer": tokenizer.name}, files=files
    )

    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.named_parameters())
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert loaded.config.eos_token_id == loaded.config.bos_token_id == tokenizer.separator
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    [ours] = tokenizer.encode([TEXT.encode()])
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ours.tolist()
    assert theirs.decode(ours) == TEXT
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.separator
    assert theirs("der")["input_ids"][0] == tokenizer.separator or not tokenizer.leads
    [said] = transformers.pipeline("text-generation", model=str(folder))("der Fluss")
    assert said["generated_text"].startswith("der Fluss")

    again = own_tokenizer(str(folder))  # --gpt2.model takes it back, with its tokenizer
    assert again is not None
    assert (again.name, again.separator, again.vocabulary) == (kind, tokenizer.separator, tokenizer.vocabulary)
    assert np.array_equal(again.encode([TEXT.encode()])[0], ours)
