"""`uft chat RUN [RUN]`: a conversation with one model, or with two side by side.

Every model has its own history: the questions and its own answers. Answers are shown without anything that could move
the cursor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uft.errors import UftError
from uft.tracking.console import phase_status, printable_lines

if TYPE_CHECKING:
    from uft.config.schema import Config
    from uft.data.chat import Renderer
    from uft.data.rows import Message
    from uft.model.policy import Policy

COMMANDS = """\
  /regen          answer the last question again, with another seed
  /system TEXT    answer under this system prompt (/system alone: none)
  /clear          forget the conversation
  /quit           leave (or Ctrl-D)"""


@dataclass
class Speaker:
    """A model that answers, and the conversation as it knows it."""

    name: str
    config: Config
    renderer: Renderer
    policy: Policy
    turns: list[Message] = field(default_factory=list)

    def answer(self, system: str | None, seed: int) -> str:
        """The answer to the last question, which is part of the conversation from then on. Raises UftError."""
        from uft.data.rows import Message
        from uft.sampling.answers import sample

        settings = replace(self.config.generate, system=system, seeds=[seed])
        ((answer,),) = sample(self.policy, self.renderer, [tuple(self.turns)], settings)
        self.turns.append(answer.said if answer.said.content else Message("assistant", " "))
        return answer.told(settings)


def talk(named: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Load the models of these (name, settings) and converse until the end of the input."""
    from uft.launch.worker import silence_libraries

    silence_libraries()
    from uft.config.frozen import to_config
    from uft.training.making import load_sampler
    from uft.training.setup import choose_device

    console, speakers = Console(highlight=False, markup=False, emoji=False), list[Speaker]()
    for name, settings in named:
        console.print(f"loading {printable_lines(name)}")
        config = to_config(settings)
        with phase_status():
            speakers.append(Speaker(name, config, *load_sampler(config, choose_device(config.hardware))))
    console.print(f"{COMMANDS}\n")
    seed = first = speakers[0].config.generate.seeds[0]
    system = speakers[0].config.generate.system
    while (line := asked(console)) is not None:
        command, _, text = line.partition(" ")
        if command == "/quit":
            break
        if command == "/clear":
            for speaker in speakers:
                speaker.turns.clear()
        elif command == "/system":
            system = text.strip() or None
        elif command == "/regen":
            if speakers[0].turns:
                seed += 1
                answered(speakers, None, system, seed, console)
        elif line.startswith("/"):
            console.print(f"no such command\n{COMMANDS}")
        elif line.strip():
            seed = first
            answered(speakers, line, system, seed, console)


def asked(console: Console) -> str | None:
    """The next line of the input; None at its end."""
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401  # lines can be edited
    try:
        return input("you> ")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def answered(
    speakers: Sequence[Speaker], question: str | None, system: str | None, seed: int, console: Console
) -> None:
    """Ask all of them and show the answers; `question` None: the last one again. Ctrl-C takes the question back."""
    from uft.data.rows import Message

    before = [list(speaker.turns) for speaker in speakers]
    try:
        answers = list[str]()
        for speaker in speakers:
            speaker.turns = [*speaker.turns, Message("user", question)] if question else speaker.turns[:-1]
            with console.status(f"{printable_lines(speaker.name)} answers"):
                answers.append(speaker.answer(system, seed))
    except (KeyboardInterrupt, UftError) as error:
        for speaker, turns in zip(speakers, before, strict=True):
            speaker.turns = turns
        lines = [f"{one.what}: {one.why}" for one in error.problems] if isinstance(error, UftError) else ["stopped"]
        console.print(printable_lines("\n".join(lines)) + "   (/clear forgets the conversation)")
        return
    if len(speakers) == 1:
        console.print(Text(printable_lines(answers[0])), "\n", sep="")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 1, 0), header_style="bold", expand=True)
    for speaker in speakers:
        table.add_column(printable_lines(speaker.name), ratio=1, overflow="fold")
    table.add_row(*(Text(printable_lines(answer)) for answer in answers))
    console.print(table)
