"""Flags of the wallet, logs, task, optimizer and rounds: what the programs share.

Torch-free, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protocol import MAX_RANGES
from tasks.config import AdamWConfig, GPT2Config, NanochatConfig, QuadraticConfig

if TYPE_CHECKING:
    from pilot.market.scheduling import RoundPolicy
    from pilot.training.diloco import DiLoCo


MOST = 1_000_000  # seconds of a round, micro-batches of an order
DILOCO_FLAGS = ("tau", "outer_lr", "nesterov_momentum", "warmup_sync", "inner_state")


@dataclass(frozen=True)
class WalletConfig:
    name: str = "default"
    """Name of the wallet (its coldkey)."""
    hotkey: str = "default"
    """Name of the hotkey that signs. On loopback a missing one is created, unencrypted."""
    path: Path = Path("~/.bittensor/wallets")
    """Folder of the wallets."""


@dataclass(frozen=True)
class LoggingConfig:
    debug: bool = False
    """Say more: the log lines of the libraries that do the work, the HTTP server's among them."""


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: disabled, offline (files under the run folder) or online (needs `wandb login`)."""
    project: str = "pilot"
    """Project that the run appears in."""


@dataclass(frozen=True)
class CodecConfig:
    up: str = ""
    """Encoding of gradients, miner to validator: fp32, bf16, int8, int4, 2bit, ternary-rc (a scale for each row and
    column), 1bit, topk64 (64 of each 4,096 values). Empty: ternary-rc, or 2bit with --mode diloco."""
    down: str = ""
    """Encoding of the model's updates, validator to miner, by the same names. Empty: 2bit, or fp32 with
    --broadcast full, which takes only fp32 and bf16."""
    feedback: float = 0.0
    """Error feedback: add this share of what the encoding of a gradient lost to the miner's next one. 0: off, which is
    better for short runs; 0.9 to 1 suits topk64."""


@dataclass(frozen=True)
class TrainingConfig:
    """What the validator and the plain baseline share."""

    task: str = "gpt2"
    """What is trained: gpt2, nanochat or quadratic."""
    gpt2: GPT2Config = field(default_factory=GPT2Config)
    nanochat: NanochatConfig = field(default_factory=NanochatConfig)
    quadratic: QuadraticConfig = field(default_factory=QuadraticConfig)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    rounds: int = 200
    """Rounds of the whole run, one optimizer step each. The learning rate's schedule ends here."""
    seed: int = 0
    """Seed of the initial parameters and of every epoch's shuffle."""
    eval_every: int = 20
    """Rounds between evaluations on the validation text; 0 for only the last, and a marketplace's first."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, mps."""
    threads: int = 0
    """CPU threads that torch uses; 0 leaves it to torch."""
    cache: Path = Path("~/.cache/pilot")
    """Folder for token files, made once a data set."""

    @property
    def optimizer_flags(self) -> Any:
        """The task's own, or AdamW's."""
        return getattr(getattr(self, self.task), "optimizer", None) or self.optimizer

    def check_task(self) -> None:
        """Raises ValueError where flags were given that the task does not heed."""
        if self.optimizer_flags is not self.optimizer and self.optimizer != AdamWConfig():
            raise ValueError(f"--optimizer.…: task {self.task} has its own; see --{self.task}.optimizer.… in --help")
        own = {"gpt2": GPT2Config(), "nanochat": NanochatConfig(), "quadratic": QuadraticConfig()}
        for task, default in own.items():
            if task != self.task and getattr(self, task) != default:
                raise ValueError(f"--{task}.…: --task is {self.task}; give --task {task}, or leave these flags out")


@dataclass(frozen=True)
class RoundConfig(TrainingConfig):
    """How rounds go, on real machines and emulated ones."""

    codec: CodecConfig = field(default_factory=CodecConfig)
    batches: int = 4
    """Micro-batches ordered from each miner in a round; with --round-seconds at least so many."""
    round_seconds: float = 0.0
    """Time budget of a round: each miner computes what it can and has its reply here by then. 0: --batches each."""
    deadline: float | Literal["auto"] | None = None
    """Seconds from sending an order until its reply must be here. auto closes a round when --quorum of its miners have
    answered and most would have by their history. None: 300, or twice --round-seconds."""
    quorum: float = 0.5
    """--deadline auto: share of a round's miners that must have answered before it may close."""
    deadline_k: float = 4.0
    """--deadline auto: a round closes at median + k * MAD of the seconds that replies took lately."""
    grace: float = 10.0
    """Seconds that miners have, when a round is closed early or the validator is stopped, to send what they did."""
    overlap: Literal[0, 1] = 0
    """1: miners go on with the last version while the validator applies their replies (gradients are a step old)."""
    coverage: Literal["stream", "once"] = "stream"
    """stream: work that was lost is ordered again first, and the next epoch does not wait for it; once: no work of the
    next epoch is ordered before all of this one is accepted."""
    broadcast: Literal["delta", "full"] = "delta"
    """How miners get a new version: delta sends what has changed, by --codec.down; full sends the whole state."""
    digest_every: int = 20
    """Rounds between proofs that every miner's model is the validator's, bit for bit. 0: none."""
    mode: Literal["gradient", "diloco"] = "gradient"
    """gradient: miners send the gradient of the round's model; diloco: they make up to --tau steps with an optimizer
    of their own, and send how far they came."""
    tau: int = 30
    """--mode diloco: inner steps of a round, each over --batches micro-batches."""
    outer_lr: float = 0.7
    """--mode diloco: learning rate of the validator's optimizer, SGD with Nesterov momentum."""
    nesterov_momentum: float = 0.7
    """--mode diloco: its momentum, the decay of the sum of its steps. 0: plain SGD."""
    warmup_sync: float = 0.1
    """--mode diloco: this fraction of the micro-batches comes first, in rounds of --mode gradient."""
    inner_state: Literal["reset", "keep"] = "keep"
    """--mode diloco: keep: the miners' optimizers go on from round to round; reset: they begin each anew."""
    aggregation: str = "median_norm_mean"
    """mean, or median_norm_mean (each contribution clipped to the median norm)."""

    def check_rounds(self) -> None:
        """Raises ValueError for names that nobody knows, and for flags that make no rounds."""
        from pilot.aggregation import AGGREGATORS
        from tasks import TASKS

        for flag, name, known in (("task", self.task, TASKS), ("aggregation", self.aggregation, AGGREGATORS)):
            if name not in known:
                raise ValueError(f"--{flag} {name}: unknown; known: {', '.join(known)}")
        self._check_codecs()
        for flag in ("batches", "round_seconds", "deadline_k", "grace"):
            value, least = getattr(self, flag), int(flag == "batches")
            if not least <= value <= MOST:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be {least} or more, and {MOST:,} at most")
        if self.digest_every < 0:
            raise ValueError(f"--digest-every {self.digest_every}: must be 0 or more")
        if not 0 < self.quorum <= 1:
            raise ValueError(f"--quorum {self.quorum:g}: a share of the miners, more than 0 and at most 1")
        if isinstance(self.deadline, float) and not max(0.1, self.round_seconds) <= self.deadline <= MOST:
            raise ValueError(
                f"--deadline {self.deadline:g}: must be 0.1 or more, and not less than --round-seconds "
                f"{self.round_seconds:g}; leave it out for twice that"
            )
        self._check_diloco()

    def _check_codecs(self) -> None:
        from pilot.codec import DENSE, known_codecs

        for flag, name in (("up", self.codec.up), ("down", self.codec.down)):
            if name not in ("", "auto", *known_codecs()):
                raise ValueError(f"--codec.{flag} {name}: unknown; known: {', '.join(known_codecs())}")
        if self.broadcast == "full" and self.codec.down not in ("", "auto", *DENSE):
            raise ValueError(
                f"--codec.down {self.codec.down}: --broadcast full sends the whole state, which only "
                f"{' and '.join(DENSE)} keep; choose one of these, or --broadcast delta"
            )
        if not 0 <= self.codec.feedback <= 1:
            raise ValueError(f"--codec.feedback {self.codec.feedback:g}: must lie between 0, which is off, and 1")

    def _check_diloco(self) -> None:
        """Flags of --mode diloco, which say nothing without it."""
        for flag in DILOCO_FLAGS:
            value = getattr(self, flag)
            if self.mode == "gradient" and value != RoundConfig.__dataclass_fields__[flag].default:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: only --mode diloco heeds it; give that too")
        if self.mode == "gradient":
            return
        if self.batches > MAX_RANGES:
            raise ValueError(f"--batches {self.batches}: of an inner step of --mode diloco, {MAX_RANGES:,} at most")
        if not 1 <= self.tau <= MOST // self.batches:
            raise ValueError(
                f"--tau {self.tau}: must be 1 or more, and with --batches {self.batches} make at most {MOST:,} "
                "micro-batches"
            )
        if not 0 < self.outer_lr < float("inf"):
            raise ValueError(f"--outer-lr {self.outer_lr:g}: must be above 0, and finite; 0.7 is the usual one")
        for flag in ("nesterov_momentum", "warmup_sync"):
            if not 0 <= getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag):g}: must be at least 0 and below 1")

    @property
    def codecs(self) -> tuple[str, str]:
        """Up and down, by which a run begins: the mode's own where none is named."""
        from pilot.codec import DENSE

        up, down = ("" if name == "auto" else name for name in (self.codec.up, self.codec.down))
        return up or ("2bit" if self.mode == "diloco" else "ternary-rc"), down or (
            "2bit" if self.broadcast == "delta" else DENSE[0]
        )

    def policy(self, run: str, patience: int) -> RoundPolicy:
        """What the orders of a run say. `patience`: rounds in a row without a good reply."""
        from pilot.market.scheduling import RoundPolicy

        given = self.deadline if isinstance(self.deadline, float) else None
        return RoundPolicy(
            run,
            self.batches,
            given or max(300.0, 2 * self.round_seconds),
            patience,
            *self.codecs,
            round_s=self.round_seconds,
            auto=self.deadline == "auto",
            quorum=self.quorum,
            deadline_k=self.deadline_k,
            grace_s=self.grace,
            overlap=self.overlap,
            once=self.coverage == "once",
            broadcast=self.broadcast,
            digest_every=self.digest_every,
            feedback=self.codec.feedback,
            diloco=self.diloco,
        )

    @property
    def diloco(self) -> DiLoCo | None:
        from pilot.training.diloco import DiLoCo, warmup_rounds

        if self.mode == "gradient":
            return None
        return DiLoCo(
            self.tau,
            self.batches,
            self.outer_lr,
            self.nesterov_momentum,
            self.inner_state == "keep",
            warmup_rounds(self.warmup_sync, self.rounds, self.tau),
            self.rounds,
            asdict(self.optimizer_flags),
        )
