"""Flags that several programs share: wallet, logs, W&B, task and optimizer, rounds.

The first sentence of a flag's docstring is what --help shows; --help-all shows all of it. No module of flags imports
torch, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pilot.common.flags import arg, nested, option
from protocol import MAX_RANGES
from tasks import TASKS, load_task
from tasks.optimizer import AdamWConfig

if TYPE_CHECKING:
    from pilot.market.scheduling import RoundPolicy
    from pilot.training.diloco import DiLoCo

T = TypeVar("T")

# The groups of --help, in its order.
TASK = "Task, data and optimizer"
TRAINING = "Length and machine"
ROUNDS = "Rounds"
LINKS = "Compression and thin links"
DILOCO = "DiLoCo"
MINERS = "Miners"
NETWORK = "Network and keys"
RUN = "Run folder and resuming"
SHOW = "Records and display"
LIMITS = "Limits on what a peer may cost"
GROUPS = (TASK, TRAINING, ROUNDS, MINERS, NETWORK, LINKS, DILOCO, RUN, SHOW, LIMITS)

MOST = 1_000_000  # seconds of a round, micro-batches of an order
DILOCO_FLAGS = ("tau", "outer_lr", "nesterov_momentum", "warmup_sync", "inner_state")


@dataclass(frozen=True)
class WalletConfig:
    """The key that signs this program's messages."""

    name: str = arg("default", short=True)
    """Name of the wallet (its coldkey)."""
    hotkey: str = arg("default", short=True)
    """Name of the hotkey that signs. On loopback a missing one is created, unencrypted."""
    path: Path = Path("~/.bittensor/wallets")
    """Folder of the wallets."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is shown. debug includes what the HTTP server and other libraries log."""
    debug: bool = False
    """The same as --logging.level debug."""
    json: bool = False
    """Print each line as a JSON object, also on a terminal. It has time, level, event, and a round's figures."""

    @property
    def least(self) -> Literal["debug", "info", "warning", "error"]:
        return "debug" if self.debug else self.level


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = arg("disabled", short=True)
    """Weights & Biases: off, files in the run folder, or online. Online needs `wandb login` first. A stricter
    WANDB_MODE in the environment holds."""
    project: str = "pilot"
    """Project that the run appears in. pilot: WANDB_PROJECT of the environment, if that is set."""


@dataclass(frozen=True)
class CodecConfig:
    """How tensors are encoded."""

    up: str = arg("", short=True)
    """Encoding of gradients, miner to validator. One of fp32, bf16, int8, int4, 2bit, ternary-rc (a scale for each row
    and column), 1bit, topk64 (64 values of each 4,096). Empty: ternary-rc, or 2bit with --mode diloco."""
    down: str = arg("", short=True)
    """Encoding of updates, validator to miner. Names as for --codec.up. Empty: 2bit, or fp32 with --broadcast full,
    which only takes fp32 and bf16."""
    feedback: float = 0.0
    """Error feedback: a miner adds what encoding lost to its next gradient, times this factor, a decay. 0: off, which
    was better in short runs; 0.9 to 1 suits topk64."""


def with_task_flags(cls: type[T]) -> type[T]:
    """Give a class of flags the configuration of each registered task, under the task's name: --gpt2.…"""
    for name in TASKS:
        config = load_task(name).Config
        cls.__annotations__[name] = config
        setattr(cls, name, nested(config, TASK, resume="fixed"))
    return cls


@dataclass(frozen=True)
@with_task_flags
class TrainingConfig:
    """The flags of the validator and the plain baseline."""

    groups: ClassVar[tuple[str, ...]] = GROUPS

    task: str = arg("gpt2", TASK, short=True, resume="fixed")
    """Task to train. Each has its own flags, --NAME.…"""
    optimizer: AdamWConfig = nested(AdamWConfig, TASK)
    rounds: int = arg(200, TRAINING, short=True)
    """Rounds of the whole run. Each is one optimizer step; the learning rate's schedule ends with the last."""
    seed: int = arg(0, TRAINING, short=True, resume="fixed")
    """Seed of parameters and shuffles."""
    eval_every: int = arg(20, TRAINING, short=True)
    """Rounds between evaluations. They use the validation data. 0: only after the last round, and before a
    marketplace's first."""
    device: str = arg("auto", TRAINING, short=True)
    """auto (CUDA if there is one), cpu, cuda, cuda:1 or mps."""
    threads: int = arg(0, TRAINING)
    """CPU threads that torch uses. 0: torch decides."""
    cache: Path = arg(Path("~/.cache/pilot"), TRAINING, path="folder")
    """Folder for token files, which are made once a data set."""

    @property
    def optimizer_flags(self) -> Any:
        """Return the task's own optimizer flags, or AdamW's."""
        return getattr(getattr(self, self.task), "optimizer", None) or self.optimizer

    def check_task(self) -> None:
        """Raise ValueError if flags were given that the task does not use."""
        if self.optimizer_flags is not self.optimizer and self.optimizer != AdamWConfig():
            raise ValueError(
                f"--optimizer.…: task {self.task} has its own; see --{self.task}.optimizer.… in --help-all"
            )
        for task in TASKS:
            if task != self.task and getattr(self, task) != load_task(task).Config():
                raise ValueError(f"--{task}.…: --task is {self.task}; give --task {task}, or leave these flags out")


@dataclass(frozen=True)
class RoundConfig(TrainingConfig):
    """The flags of rounds, on real machines and simulated ones."""

    codec: CodecConfig = nested(CodecConfig, LINKS, resume="fixed")
    batches: int = arg(4, ROUNDS, short=True)
    """Micro-batches per miner and round. With --round-seconds, the fewest."""
    round_seconds: float = arg(0.0, ROUNDS, short=True)
    """Seconds of a round, instead of --batches. Each miner computes what it can in this time. 0: --batches each."""
    deadline: float | Literal["auto"] | None = arg(None, ROUNDS, short=True)
    """Seconds until a reply must arrive. They begin when the order is sent. auto: close a round when --quorum of its
    miners have answered and most others would have, judging by their history. None: 300, or twice --round-seconds."""
    quorum: float = arg(0.5, ROUNDS)
    """Share of a round's miners that must have answered before --deadline auto may close it."""
    deadline_k: float = arg(4.0, ROUNDS)
    """With --deadline auto a round closes at median + k * MAD of the seconds that recent replies took."""
    grace: float = arg(10.0, ROUNDS)
    """Seconds that miners have to send their partial work when a round closes early or the validator stops."""
    overlap: Literal[0, 1] = arg(0, ROUNDS, short=True)
    """1: miners never wait for the validator. They compute on while it applies their replies, so gradients are one step
    old. 0: they wait."""
    coverage: Literal["stream", "once"] = arg("stream", ROUNDS)
    """When the next epoch begins. stream: at once, and lost work is ordered again first. once: after all work of this
    epoch has been accepted."""
    broadcast: Literal["delta", "full"] = arg("delta", LINKS, resume="fixed")
    """What miners get for a new version: the change, encoded by --codec.down, or the full state."""
    digest_every: int = arg(20, ROUNDS)
    """Rounds between checks that every miner's model equals the validator's bit for bit. 0: no checks."""
    mode: Literal["gradient", "diloco"] = arg("gradient", DILOCO, short=True, resume="fixed")
    """What miners send. gradient: the gradient of the round's model. diloco: the model's change after up to --tau
    optimizer steps of their own."""
    tau: int = arg(30, DILOCO, short=True, resume="fixed")
    """Inner steps in a round. Each is over --batches micro-batches."""
    outer_lr: float = arg(0.7, DILOCO)
    """Learning rate of the validator's optimizer, SGD with Nesterov momentum."""
    nesterov_momentum: float = arg(0.7, DILOCO)
    """Momentum of the validator's optimizer, the decay of the sum of its steps. 0: plain SGD."""
    warmup_sync: float = arg(0.1, DILOCO, resume="fixed")
    """Fraction of the micro-batches to train on first in rounds of --mode gradient."""
    inner_state: Literal["reset", "keep"] = arg("keep", DILOCO)
    """What happens to the miners' optimizer state between rounds."""
    aggregation: str = arg("median_norm_mean", ROUNDS, short=True, resume="fixed")
    """mean, median_norm_mean, a robust rule, or your package.module:function. The second clips each contribution to the
    median norm. Robust rules: trimmed_mean, coordinate_median, krum, multi_krum, geometric_median, centered_clipping.
    They may have mixers before them: nnm, bucketing, arc, as in nnm+trimmed_mean."""

    norm_bound: float = arg(10.0, ROUNDS)
    """Refuse contributions of a norm so many times that of the last rounds'. They are OUTLIER. 0: refuse none."""
    rollback: int = arg(3, ROUNDS)
    """Steps in a row that are undone if the model diverges by them. Their work is ordered again. After that the run
    ends. 0: it ends at the first one."""

    def check_rounds(self) -> None:
        """Raise ValueError for unknown names and for values that no round can use."""
        from pilot.aggregation import AGGREGATORS, load_aggregator

        if self.task not in TASKS:
            raise ValueError(f"--task {self.task}: unknown; known: {', '.join(TASKS)}")
        if self.aggregation not in AGGREGATORS:  # ours would import torch
            load_aggregator(self.aggregation)
        self._check_codecs()
        for name in ("batches", "round_seconds", "deadline_k", "grace"):
            number, least = getattr(self, name), int(name == "batches")
            if not least <= number <= MOST:
                raise ValueError(f"{option(name)} {number}: must be {least} or more, and {MOST:,} at most")
        if not (self.norm_bound == 0 or 1 < self.norm_bound <= MOST):
            raise ValueError(f"--norm-bound {self.norm_bound:g}: must be above 1, or 0 for none; 10 is usual")
        if not 0 <= self.rollback <= MOST:
            raise ValueError(f"--rollback {self.rollback}: must be 0 or more")
        if self.digest_every < 0:
            raise ValueError(f"--digest-every {self.digest_every}: must be 0 or more")
        if not 0 < self.quorum <= 1:
            raise ValueError(f"--quorum {self.quorum:g}: must be a share of the miners, more than 0 and at most 1")
        if isinstance(self.deadline, float) and not max(0.1, self.round_seconds) <= self.deadline <= MOST:
            raise ValueError(
                f"--deadline {self.deadline:g}: must be 0.1 or more, and not less than --round-seconds "
                f"{self.round_seconds:g}; leave it out for twice that"
            )
        self._check_diloco()

    def _check_codecs(self) -> None:
        from pilot.codec import DENSE, known_codecs

        for name, codec in (("up", self.codec.up), ("down", self.codec.down)):
            if codec not in ("", *known_codecs()):
                raise ValueError(f"--codec.{name} {codec}: unknown; known: {', '.join(known_codecs())}")
        if self.broadcast == "full" and self.codec.down not in ("", *DENSE):
            raise ValueError(
                f"--codec.down {self.codec.down}: --broadcast full sends the whole state, for which only "
                f"{' and '.join(DENSE)} are exact enough; choose one of these, or --broadcast delta"
            )
        if not 0 <= self.codec.feedback <= 1:
            raise ValueError(f"--codec.feedback {self.codec.feedback:g}: must lie between 0 (off) and 1")

    def _check_diloco(self) -> None:
        if self.mode == "gradient":
            for name in DILOCO_FLAGS:
                value = getattr(self, name)
                if value != RoundConfig.__dataclass_fields__[name].default:
                    raise ValueError(f"{option(name)} {value}: only --mode diloco uses it; give that too")
            return
        if self.batches > MAX_RANGES:
            raise ValueError(f"--batches {self.batches}: an inner step of --mode diloco takes {MAX_RANGES:,} at most")
        if not 1 <= self.tau <= MOST // self.batches:
            raise ValueError(
                f"--tau {self.tau}: must be 1 or more, and with --batches {self.batches} make at most {MOST:,} "
                "micro-batches"
            )
        if not 0 < self.outer_lr < float("inf"):
            raise ValueError(f"--outer-lr {self.outer_lr:g}: must be above 0, and finite; 0.7 is usual")
        for name in ("nesterov_momentum", "warmup_sync"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{option(name)} {getattr(self, name):g}: must be at least 0 and below 1")

    @property
    def codecs(self) -> tuple[str, str]:
        """Return the codecs, up and down, that a run starts with: the mode's defaults where none is named."""
        from pilot.codec import DENSE

        up, down = self.codec.up, self.codec.down
        return up or ("2bit" if self.mode == "diloco" else "ternary-rc"), down or (
            "2bit" if self.broadcast == "delta" else DENSE[0]
        )

    def policy(self, run: str, patience: int, patience_s: float = 0.0) -> RoundPolicy:
        """Return the policy of a run's rounds.

        The run gives up after `patience` rounds in a row without a valid reply that took `patience_s` together.
        """
        from pilot.market.scheduling import RoundPolicy

        given = self.deadline if isinstance(self.deadline, float) else None
        return RoundPolicy(
            run,
            self.batches,
            given or max(300.0, 2 * self.round_seconds),
            patience,
            *self.codecs,
            patience_s=patience_s,
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
            norm_bound=self.norm_bound,
            rollback=self.rollback,
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
