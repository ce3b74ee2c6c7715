"""Continue text with a trained model, or chat with it.

    pilot-sample runs/demo --prompt "def main("
    pilot-sample runs/demo                       # asks for one prompt after the other
    pilot-sample runs/chat --chat                # holds a conversation

It reads every language model that a run leaves in its folder, and those in Hugging Face's form.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.app import cli
from pilot.common import interrupts
from pilot.common.flags import arg

if TYPE_CHECKING:
    from nanochat.engine import Sampling
    from tasks.generation import TextModel

PROGRAM = "pilot-sample"


@dataclass(frozen=True)
class SampleConfig:
    """Continue text with a trained model, or chat with it."""

    model: Path | None = arg(None, short=True)
    """Folder of a run, or of a model. It may be given without the flag's name, first."""
    prompt: tuple[str, ...] = arg((), short=True)
    """Texts to continue. None: standard input, on a terminal one line after the other."""
    chat: bool = arg(False, short=True)
    """Hold a conversation, in the form that the model's tokenizer has for it."""
    samples: int = arg(1, short=True)
    """Continuations of each prompt."""
    max_tokens: int = arg(100, short=True)
    """Tokens in a continuation, at most."""
    temperature: float = arg(0.8, short=True)
    """Below 1 likely tokens become likelier. 0 takes the likeliest."""
    top_k: int = 50
    """Choose among this many of the likeliest tokens. 0: all of them."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 42
    """Seed of the first continuation; the next one has the next seed."""
    step: int | None = None
    """Take the model of this step. None: the newest."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 0
    """CPU threads of torch. 0: torch's own choice."""

    def check(self) -> None:
        """Raise ValueError for values that no sample can have."""
        if self.model is None:
            raise ValueError("--model: name the folder of a run, such as runs/demo, or of a model")
        for name, least in (("samples", 1), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least} or more")
        if self.chat and self.prompt:
            raise ValueError("--chat: reads what you say from standard input; leave --prompt out")


@cli.program(PROGRAM, SampleConfig)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    if argv is None:
        interrupts.catch(PROGRAM)
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    config = cli.parse(SampleConfig, PROGRAM, argv)
    with cli.mistakes(PROGRAM):
        config.check()
        model, how = load(config)
        if config.chat:
            chat(config, model, how)
            return
        for prompt in config.prompt or asked():
            for number in range(config.samples):
                write(model, prompt, model.encode(prompt), config, how, config.seed + number)


def load(config: SampleConfig) -> tuple[TextModel, Sampling]:
    """Return the model and how to choose its tokens. Raises ValueError for what cannot be loaded."""
    cli.set_threads(config.threads)
    device = cli.pick_device(config.device)
    from nanochat.engine import Sampling
    from tasks.generation import load_text_model

    try:
        how = Sampling(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise ValueError(f"--{str(error).replace('_', '-', 1)}") from None
    assert config.model is not None  # see check
    try:
        return load_text_model(config.model.expanduser(), device, config.step), how
    except ValueError as error:
        raise ValueError(f"--model {error}") from None


def asked(ask: str = "> ") -> Iterator[str]:
    """Yield what the user types, a line at a time; without a terminal all of standard input at once."""
    if not sys.stdin.isatty():
        yield sys.stdin.read()
        return
    while True:
        print(ask, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return
        yield line.rstrip("\n")


def write(model: TextModel, shown: str, ids: Sequence[int], config: SampleConfig, how: Sampling, seed: int) -> str:
    """Print `shown` and what follows the ids, as it is made. Returns what follows."""
    from tasks.generation import continuation

    print(shown, end="", flush=True)
    said = []
    for piece in continuation(model, ids, max_tokens=config.max_tokens, how=how, seed=seed):
        print(piece, end="", flush=True)
        said.append(piece)
    print(flush=True)
    return "".join(said)


def chat(config: SampleConfig, model: TextModel, how: Sampling) -> None:
    """Answer what the user says, one message after the other."""
    conversation: list[dict[str, str]] = []
    for number, text in enumerate(asked("you: ")):
        conversation.append({"role": "user", "content": text})
        answer = write(model, "", model.render(conversation), config, how, config.seed + number)
        conversation.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
