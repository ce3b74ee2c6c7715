"""Run the examples of docs/EXTENDING.md through the real loaders, in a small marketplace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import tasks
from pilot import aggregation, codec
from pilot.aggregation import load_aggregator
from pilot.codec import load_codec
from pilot.ranking import load_ranker
from pilot.simulation.virtual_time import run
from protocol import Fault, ProtocolError
from tasks import load_task
from tasks.optimizer import AdamWConfig
from tests import tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "EXTENDING.md"
EXAMPLES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
ROUNDS = 3


@pytest.fixture(autouse=True)
def _examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put each example into a file that can be imported, and the page's lines into the registries."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name, text in EXAMPLES.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(aggregation.AGGREGATORS, "coordinate_median", line("coordinate_median"))
    monkeypatch.setitem(codec.CODECS, "fp16", line("fp16"))
    monkeypatch.setitem(tasks.TASKS, "line", line("line"))
    monkeypatch.setitem(codec.BITS, "fp16", 16.0)


def line(name: str) -> str:
    """Return the target of the page's registry line for `name`."""
    [target] = re.findall(rf'^    "{name}": "(\S+)",$', PAGE.read_text(), re.M)
    return str(target)


@pytest.mark.parametrize(
    ("ranker", "score"), [("reliability:Reliability", "reliability"), ("agreement:Agreement", "agreement")]
)
def test_the_rankers_pay_honest_miners_alike(tmp_path: Path, ranker: str, score: str) -> None:
    async def market() -> dict[str, float]:
        place = tiny.make_place(tmp_path, tiny.tiny_task(tmp_path), ranker=ranker)
        await tiny.play(place.market, ROUNDS)
        head = place.store.head()
        assert head is not None
        again = load_ranker(ranker)
        again.load_state_dict(place.market.ranker.state_dict())
        assert again.weights() == place.market.ranker.weights()
        assert all(r.scores[score] > 0 for r in tiny.receipts(place.store, head.round).values())
        await place.market.close()
        return dict(head.weights)

    weights = run(market())
    assert list(weights.values()) == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("policy", [{"aggregation": "coordinate_median"}, {"codec_up": "fp16", "codec_down": "fp16"}])
def test_a_marketplace_trains_with_the_aggregator_and_the_codec(tmp_path: Path, policy: dict[str, str]) -> None:
    async def market() -> list[float]:
        place = tiny.make_place(tmp_path, tiny.tiny_task(tmp_path), broadcast="delta", **policy)  # type: ignore[arg-type]
        before = await place.market.evaluate()
        await tiny.play(place.market, ROUNDS)
        verdicts = [r.verdict for round in range(ROUNDS) for r in tiny.receipts(place.store, round).values()]
        assert verdicts == ["ACCEPTED"] * 2 * ROUNDS
        after = await place.market.evaluate()
        await place.market.close()
        return [before["val_loss"], after["val_loss"]]

    before, after = run(market())
    assert after < before


def test_the_aggregator_takes_the_median_of_each_coordinate() -> None:
    class Sent:
        count, norm, specs = 1, 1.0, {"b": torch.Size([2]), "a": torch.Size([2, 1])}

        def __init__(self, *values: float) -> None:
            self.flat = torch.tensor(values)

        def add(self, into: object, weight: float) -> None:
            raise AssertionError("the median reads blocks")

        def read(self, start: int, stop: int) -> torch.Tensor:
            return self.flat[start:stop]

    result = load_aggregator("coordinate_median")([Sent(0, 1, 2, 3), Sent(9, 1, -2, 3), Sent(1, 1, 1, 1e9)])
    assert result["a"].tolist() == [[1.0], [1.0]]
    assert result["b"].tolist() == [1.0, 3.0]


def test_the_codec_refuses_what_it_did_not_write() -> None:
    half = load_codec("fp16")
    tensors = {"w": torch.tensor([[1.0, -2.5], [0.0, 65504.0]])}
    specs = {"w": torch.Size([2, 2])}
    payload = bytes(half.encode(tensors))
    assert len(payload) == half.largest(specs)
    assert torch.equal(half.decode(payload, specs)["w"], tensors["w"])
    assert half.read(payload, specs, 1, 3).tolist() == [-2.5, 0.0]
    for junk in (b"", payload[:-1], payload + b"\0", b"fp17" + payload[4:]):
        with pytest.raises(ProtocolError):
            half.check(junk, specs)
    with pytest.raises(ProtocolError) as refused:
        half.check(payload[:-2] + b"\x00\x7c", specs)
    assert refused.value.fault is Fault.NONFINITE


def test_a_marketplace_trains_the_task(tmp_path: Path) -> None:
    made = load_task("line").prepare(
        sys.modules["line"].LineConfig(), seed=0, cache=tmp_path, device=tiny.CPU, progress=print
    )

    async def market() -> float:
        place = tiny.make_place(tmp_path, made, optimizer=AdamWConfig(lr=0.2, warmup=0), codec_up="ternary-rc")
        await tiny.play(place.market, tiny.ROUNDS)
        after = await place.market.evaluate()
        await place.market.close()
        return float(after["val_loss"])

    assert run(market()) < 0.05
    with pytest.raises(ProtocolError):
        load_task("line").from_spec(made.spec(), made.data_spec, lambda name: PAGE)
