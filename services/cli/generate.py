"""`calumma generate`: one prompt, its answer as it comes."""

import sys
from collections.abc import Callable
from typing import Annotated, Final

import grpc
import typer

from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.cli import output
from services.cli.connect import dialled
from services.cli.shapes import AnswerShape

PROMPT_CHARACTERS_MAX: Final = 16 * 2**20  # of stdin; the gateway's own limit is far lower
TIMEOUT_S: Final = 300.0

AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter", "-a", help="NAME, NAME@VERSION or NAME@ALIAS. Without it: the base model."
    ),
]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=0, max=2**31 - 1, help="Most tokens to generate.")
]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy, the default.")]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same answer.")
]
TimeoutOption = Annotated[float, typer.Option(min=0.001, help="Seconds until the answer's end.")]


def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    *,
    adapter: AdapterOption = "",
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="As a user's message, or as bare text.")
    ] = True,
    system: Annotated[str, typer.Option(help="System message before the prompt.")] = "",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it. Repeatable.")] = None,
    timeout: TimeoutOption = TIMEOUT_S,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    as_json: output.JsonFlag = False,
) -> None:
    """Answer a prompt with the base model or one adapter.

    The answer goes to stdout; tokens, times, adapter and worker go to stderr. With --json one
    object with all of it goes to stdout.
    """
    if system and not chat:
        raise typer.BadParameter("a bare prompt has no system message", param_hint="--system")
    request = gateway_pb2.GenerateStreamRequest(adapter=adapter)
    set_sampling(request, max_tokens=max_tokens, temperature=temperature, seed=seed)
    if stop:
        request.stopping.stop.extend(stop)
    text = _read_stdin() if prompt == "-" else prompt
    if chat:
        if system:
            request.chat.messages.add(role="system", content=system)
        request.chat.messages.add(role="user", content=text)
    else:
        request.prompt = text
    live = stream and not as_json
    with dialled("gateway", output.session_of(ctx).addresses.gateway) as channel:
        on_text = write_text if live else _ignore
        answer = ask(channel, request, timeout_s=timeout, on_text=on_text)
    if as_json:
        output.print_json(answer)
        return
    write_text("\n" if live else f"{answer.text}\n")
    output.note(summary(answer))


def set_sampling(
    request: gateway_pb2.GenerateStreamRequest,
    *,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Set what was given; the rest stays absent, so that the server's defaults apply."""
    if max_tokens is not None:
        request.stopping.max_tokens = max_tokens
    if temperature is not None:
        request.sampling.temperature = temperature
    if seed is not None:
        request.sampling.seed = seed


def ask(
    channel: grpc.Channel,
    request: gateway_pb2.GenerateStreamRequest,
    *,
    timeout_s: float,
    on_text: Callable[[str], None],
) -> AnswerShape:
    """Run one request; `on_text` gets each piece. Cancels it if this is left early."""
    started: gateway_pb2.GenerateStarted | None = None
    completion: gateway_pb2.Completion | None = None
    pieces: list[str] = []
    token_ids: list[int] = []
    waiting = output.stderr.status("waiting for the first token")
    call = gateway_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request, timeout=timeout_s)
    try:
        waiting.start()
        for response in call:
            match response.WhichOneof("event"):
                case "started":
                    started = response.started
                case "chunk":
                    waiting.stop()
                    pieces.append(response.chunk.text)
                    token_ids.extend(response.chunk.token_ids)
                    on_text(response.chunk.text)
                case "finished":
                    completion = response.finished
                case _:
                    pass  # an event of a newer server
    finally:
        waiting.stop()
        call.cancel()
        if pieces and completion is None:
            on_text("\n")  # what is said about the failure begins a line of its own
    if started is None or completion is None:
        raise output.CommandError("the gateway ended the stream without a result")
    text = "".join(pieces)
    return AnswerShape.of(started, completion, text=text, token_ids=tuple(token_ids))


def write_text(text: str) -> None:
    """A piece of an answer to stdout, at once; as it is unless a terminal would obey it."""
    sys.stdout.write(output.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def summary(answer: AnswerShape) -> str:
    """One line: tokens, first token, speed, adapter, worker."""
    timings = answer.timings
    parts = [f"{answer.output_tokens} tokens"]
    if timings.time_to_first_token_s is not None:
        parts.append(f"first after {output.seconds_text(timings.time_to_first_token_s)}")
    if timings.decode_s and answer.output_tokens > 1:
        parts.append(f"{(answer.output_tokens - 1) / timings.decode_s:.1f} tok/s")
    if answer.adapter_digest is None:
        parts.append("base model")
    else:
        digest = output.short_digest(answer.adapter_digest)
        name = f"{answer.adapter_name}@{answer.adapter_version}"
        parts.append(f"{name} {digest} ({timings.adapter_tier})")
    parts.append(f"worker {answer.worker_id}")
    if answer.finish_reason != "stop":
        parts.append(f"ended by {answer.finish_reason}")
    return " · ".join(parts)


def _read_stdin() -> str:
    text = sys.stdin.read(PROMPT_CHARACTERS_MAX + 1)
    if len(text) > PROMPT_CHARACTERS_MAX:
        raise output.CommandError(f"stdin has more than {PROMPT_CHARACTERS_MAX} characters")
    return text.removesuffix("\n")


def _ignore(_text: str) -> None:
    return
