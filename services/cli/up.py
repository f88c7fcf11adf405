"""`calumma up`: the whole suite on this machine, from nothing to streaming answers.

Pulls the model, starts the services on loopback in dependency order, publishes the example
adapters, then shows the merged logs until Ctrl-C. A second Ctrl-C ends everything at once.
"""

import asyncio
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer
from rich.table import Table
from rich.text import Text

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.cli import adapters, output
from services.cli.connect import explain
from services.cli.examples import find_examples, sample_prompts
from services.cli.log_view import LogView
from services.cli.output import CommandError
from services.cli.plan import Endpoints, Plan, check_ports, process_specs
from services.cli.processes import Suite
from services.common import base_model
from services.common.base_model import DEFAULT_MODEL
from services.common.clients import open_channel
from services.core.policies import POLICY_NAMES
from services.core.systems import SYSTEMS

_GRACE_MARGIN_S: Final = 5.0  # for what a service does after its own grace period


def up(
    *,
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = DEFAULT_MODEL,
    adapters_folder: Annotated[
        Path | None,
        typer.Option(
            "--adapters",
            exists=True,
            file_okay=False,
            help="Folder of PEFT folders to publish. Default: the examples of this checkout.",
        ),
    ] = None,
    no_adapters: Annotated[bool, typer.Option("--no-adapters", help="Publish nothing.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 1,
    engine: Annotated[str | None, typer.Option(help="torch or simulated.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    system: Annotated[
        str | None, typer.Option(help=f"How requests are scheduled: {', '.join(SYSTEMS)}.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help=f"Queues, not the system's: {', '.join(POLICY_NAMES)}.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(file_okay=False, help="Cache folder instead of CALUMMA_HOME.")
    ] = None,
    port_base: Annotated[
        int, typer.Option(min=1024, max=65_000, help="First of the ports that are used.")
    ] = 7100,
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that running work gets at the end.")
    ] = 10.0,
    ready_timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds that each service gets to start.")
    ] = 300.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: output.JsonFlag = False,
) -> None:
    """Start all four services here, with the example adapters, until Ctrl-C.

    With --json stdout is one JSON object per line: the services' own logs, and lines with
    "service": "up", among them one with "event": "ready", the endpoints and the adapters.
    """
    _check_known("system", system, SYSTEMS)
    _check_known("policy", policy, POLICY_NAMES)
    endpoints = Endpoints.on_loopback(port_base, workers)
    check_ports(endpoints)
    plan = Plan(
        model=_fetched(model, home, needs_weights=engine != "simulated"),
        endpoints=endpoints,
        home=home.resolve() if home else None,
        engine=engine,
        device=device,
        dtype=dtype,
        system=system,
        policy=policy,
        grace_s=grace,
        log_level=log_level,
    )
    folders = {} if no_adapters else find_examples(adapters_folder)
    view = LogView(output.stdout, as_json=as_json)
    asyncio.run(_run(plan, folders, view, ready_timeout_s=ready_timeout))


def _check_known(option: str, name: str | None, names: Collection[str]) -> None:
    """Say before anything is started what the services would refuse."""
    if name is not None and name not in names:
        hint = f"there are: {', '.join(names)}"
        raise CommandError(f"there is no {option} {name!r}", field=option, hint=hint)


def _fetched(model: str, home: Path | None, *, needs_weights: bool) -> str:
    """The model as services can find it: its absolute folder, or its hub id, pulled by now."""
    if Path(model).expanduser().is_dir():
        folder = base_model.locate(model)
        (base_model.check_folder if needs_weights else base_model.load_config)(folder)
        return str(folder)
    if base_model.pulled_folder(model, home=home).is_dir():
        base_model.check_folder(base_model.pulled_folder(model, home=home))
        return model
    from services.cli.model import progress_bars, pull

    with progress_bars() as progress:
        pull(model, home=home, progress=progress)
    return model


async def _run(
    plan: Plan, folders: dict[str, Path], view: LogView, *, ready_timeout_s: float
) -> None:
    """Everything that happens while processes live; leaves none behind."""
    suite = Suite(process_specs(plan), view)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            suite.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _end_signals():
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(_serve(suite, plan, folders, view, ready_timeout_s))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        stopped.cancel()
        serving.cancel()
        await asyncio.gather(serving, stopped, return_exceptions=True)
        view.event("draining", grace_s=plan.grace_s)
        with view.waiting("waiting for running work to end; Ctrl-C again ends it now"):
            await suite.stop(plan.grace_s + _GRACE_MARGIN_S)
        view.event("stopped")


def _end_signals() -> tuple[signal.Signals, ...]:
    """A closed terminal ends everything too, unless `nohup` says otherwise."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


async def _serve(
    suite: Suite, plan: Plan, folders: dict[str, Path], view: LogView, ready_timeout_s: float
) -> None:
    """Start, publish, announce, then keep alive until cancelled."""
    for child in suite.children:
        with view.waiting(f"waiting for {child.spec.name}"):
            await child.start()
            await child.wait_ready(ready_timeout_s)
        view.event("serving", process=child.spec.name, address=child.spec.address)
    published = await _publish(plan.endpoints, folders, view)
    _announce(plan.endpoints, published, folders, view)
    await suite.keep_alive()


async def _publish(
    endpoints: Endpoints, folders: dict[str, Path], view: LogView
) -> tuple[str, ...]:
    """Publish each folder under its name. One that is refused does not stop the others."""
    sizes = {name: adapters.folder_bytes(folder) for name, folder in folders.items()}
    published: list[str] = []
    with output.byte_progress("publishing", console=view.bars) as progress:
        progress.expect(sum(sizes.values()))
        for name, folder in folders.items():
            progress.describe(f"publishing {name}")
            try:
                await _publish_one(endpoints.adapter_store, name, folder, progress.advance)
            except CommandError as error:
                view.event("not_published", level="warning", adapter=name, why=error.message)
            else:
                published.append(name)
    return tuple(published)


async def _publish_one(
    address: str, name: str, folder: Path, on_sent: Callable[[int], None]
) -> None:
    metadata = adapter_store_pb2.PublishMetadata(name=name)
    requests = adapters.publish_requests(folder, metadata, on_sent=on_sent)
    async with open_channel(address) as channel:
        store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        try:
            await store.Publish(requests, timeout=adapters.PUBLISH_TIMEOUT_S)
        except grpc.RpcError as error:
            raise explain(error, "adapter_store", address) from error


def _announce(
    endpoints: Endpoints, published: tuple[str, ...], folders: dict[str, Path], view: LogView
) -> None:
    """Say where everything is and what to try."""
    commands = endpoints.commands_to_try(sample_prompts(published, folders))
    if view.as_json:
        addresses = {
            "gateway": endpoints.gateway,
            "scheduler": endpoints.scheduler,
            "adapter_store": endpoints.adapter_store,
            "workers": endpoints.workers,
        }
        view.event("ready", endpoints=addresses, adapters=published, commands=commands)
        return
    table = Table.grid(padding=(0, 2))
    for label, address in endpoints.labelled():
        table.add_row(Text(label, style="bold"), address)
    console = view.console
    console.rule("[bold green]Calumma is ready")
    console.print(table)
    console.print(Text(f"{len(published)} adapters: {', '.join(published) or 'none'}"))
    console.print(Text("\nTry in another terminal:", style="bold"))
    for command in commands:
        console.print(Text(f"  {command}", style="green"), soft_wrap=True)
    console.print(Text("\nCtrl-C drains and stops everything.", style="dim"))
    console.rule()
