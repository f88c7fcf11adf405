"""The commands of `calumma` and what they share: addresses, `--json`, and the errors' way out."""

from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from services.cli import adapters, chat, generate, models, output, status, up
from services.common.base_model import BaseModelError


class _Commands(TyperGroup):
    """The boundary: a known failure is shown as text or JSON and ends with code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            output.note("interrupted")
            raise typer.Exit(130) from None
        except (output.CommandError, BaseModelError, UnicodeError, ModuleNotFoundError) as error:
            as_json = isinstance(ctx.obj, output.Session) and ctx.obj.as_json
            output.show_error(_explained(error), as_json=as_json)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Serve one base LLM to thousands of LoRA adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(adapters.app, name="adapters")
app.command("status")(status.status)
app.add_typer(models.app, name="model")


@app.callback()
def addresses(
    ctx: typer.Context,
    *,
    gateway: Annotated[
        str, typer.Option(envvar="CALUMMA_GATEWAY_ADDRESS", metavar="HOST:PORT")
    ] = "127.0.0.1:7100",
    scheduler: Annotated[
        str, typer.Option(envvar="CALUMMA_SCHEDULER_ADDRESS", metavar="HOST:PORT")
    ] = "127.0.0.1:7101",
    worker: Annotated[
        str, typer.Option(envvar="CALUMMA_WORKER_ADDRESS", metavar="HOST:PORT")
    ] = "127.0.0.1:7102",
    adapter_store: Annotated[
        str, typer.Option(envvar="CALUMMA_ADAPTER_STORE_ADDRESS", metavar="HOST:PORT")
    ] = "127.0.0.1:7103",
) -> None:
    """Where the services listen."""
    ctx.obj = output.Session(
        output.Addresses(
            gateway=gateway, scheduler=scheduler, adapter_store=adapter_store, worker=worker
        )
    )


@app.command("version")
def version(*, as_json: output.JsonFlag = False) -> None:
    """Print the version."""
    number = installed_version("calumma")
    if as_json:
        output.print_json({"version": number})
    else:
        output.stdout.print(f"calumma {number}")


def _explained(error: Exception) -> output.CommandError:
    match error:
        case output.CommandError():
            return error
        case UnicodeError():
            return output.CommandError("the input is not valid UTF-8")
        case ModuleNotFoundError():
            hint = "pip install 'calumma[all]'"
            return output.CommandError(f"{error.name} is not installed", hint=hint)
        case _:
            return output.CommandError(str(error))
