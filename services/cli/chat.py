"""`calumma chat`: a conversation at the terminal, or one message per line from a pipe."""

import importlib
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Final

import grpc
import typer

from calumma.gateway.v1 import gateway_pb2
from services.cli import generate, output
from services.cli.connect import dialled

_HELP: Final = """/adapter [NAME]  answer with this adapter; without a name with the base model
/system [TEXT]   set or clear the system message
/reset           forget the conversation
/quit            leave (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass(slots=True)
class Conversation:
    """What has been said, and how to answer."""

    adapter: str = ""
    system: str = ""
    turns: list[gateway_pb2.ChatMessage] = field(default_factory=list)

    def messages(self) -> list[gateway_pb2.ChatMessage]:
        """All of it, with the system message first."""
        system = gateway_pb2.ChatMessage(role="system", content=self.system)
        return [*([system] if self.system else []), *self.turns]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The same for every answer."""

    max_tokens: int | None
    temperature: float | None
    seed: int | None
    timeout_s: float


def chat(
    ctx: typer.Context,
    *,
    adapter: generate.AdapterOption = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: generate.MaxTokensOption = None,
    temperature: generate.TemperatureOption = None,
    seed: generate.SeedOption = None,
    timeout: generate.TimeoutOption = generate.TIMEOUT_S,
) -> None:
    """Talk with the base model or one adapter; /help lists the commands.

    From a pipe every line is a message, and the first failure ends it with code 1.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` line editing and a history
        output.note("/help lists the commands, /quit leaves")
    conversation = Conversation(adapter, system)
    sampling = Sampling(max_tokens, temperature, seed, timeout)
    while (line := _read_line(conversation, interactive=interactive)) is not None:
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        elif line:
            address = output.session_of(ctx).addresses.gateway
            _take_turn(line, conversation, sampling, address=address, interactive=interactive)


def _read_line(conversation: Conversation, *, interactive: bool) -> str | None:
    """The next line without its edges, or None at the end."""
    if not interactive:
        line = sys.stdin.readline(generate.PROMPT_CHARACTERS_MAX)
        return line.strip() if line else None
    try:
        return input(f"{conversation.adapter or 'base'}> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _obey(line: str, conversation: Conversation) -> bool:
    """Follow a /command. False: leave."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/quit" | "/exit":
            return False
        case "/adapter":
            conversation.adapter = argument
            output.note(f"answering with {argument or 'the base model'}")
        case "/system":
            conversation.system = argument
            output.note("system message set" if argument else "no system message")
        case "/reset":
            conversation.turns.clear()
            output.note("conversation forgotten")
        case "/help":
            output.note(_HELP)
        case _:
            output.note(f"unknown command {command}\n{_HELP}")
    return True


def _take_turn(
    line: str,
    conversation: Conversation,
    sampling: Sampling,
    *,
    address: str,
    interactive: bool,
) -> None:
    """Ask, print, and keep the turn when it was answered."""
    question = gateway_pb2.ChatMessage(role="user", content=line)
    conversation.turns.append(question)
    try:
        with dialled("gateway", address) as channel:
            text = _answer(channel, conversation, sampling)
    except (output.CommandError, KeyboardInterrupt) as error:
        conversation.turns.pop()
        if not interactive:
            raise
        match error:
            case output.CommandError():
                output.show_error(error)
            case KeyboardInterrupt():
                output.note("stopped; this turn is forgotten")
        return
    conversation.turns.append(gateway_pb2.ChatMessage(role="assistant", content=text))


def _answer(channel: grpc.Channel, conversation: Conversation, sampling: Sampling) -> str:
    request = gateway_pb2.GenerateStreamRequest(adapter=conversation.adapter)
    request.chat.messages.extend(conversation.messages())
    generate.set_sampling(
        request,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
    )
    answer = generate.ask(
        channel, request, timeout_s=sampling.timeout_s, on_text=generate.write_text
    )
    generate.write_text("\n")
    output.note(generate.summary(answer))
    return answer.text
