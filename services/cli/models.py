"""`calumma model …`: fetch a base model into the cache folder, and say what is there."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from services.cli import output
from services.common import base_model
from services.common.base_model import DEFAULT_MODEL

app = typer.Typer(help="Fetch and inspect base models.", no_args_is_help=True)
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id like org/name, or a folder.")
]


@app.command("pull")
def pull(
    _ctx: typer.Context, model: ModelArgument = DEFAULT_MODEL, *, as_json: output.JsonFlag = False
) -> None:
    """Fetch MODEL unless it is there already."""
    from services.cli.model import progress_bars
    from services.cli.model import pull as pull_model

    with progress_bars() as progress:
        folder = pull_model(model, progress=progress)
    if as_json:
        output.print_json({"model": model, "folder": str(folder)})
    else:
        output.stdout.print(Text(f"{model} is in {folder}"), soft_wrap=True)


@app.command("show")
def show(model: ModelArgument = DEFAULT_MODEL, *, as_json: output.JsonFlag = False) -> None:
    """Show where MODEL is, its digest and its shape."""
    folder = base_model.locate(model)
    config = base_model.check_folder(folder)
    identity = base_model.model_identity(folder)
    size_bytes = sum(file.stat().st_size for file in base_model.weight_files(folder))
    fields = {
        "name": identity.name,
        "digest": identity.digest,
        "folder": str(folder),
        "weights_bytes": size_bytes,
        "config": asdict(config),
    }
    if as_json:
        output.print_json(fields)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a digest or path that ends in "…" can't be copied
    shape = (
        f"{config.num_layers} layers, width {config.hidden_size}, FFN {config.intermediate_size}"
    )
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys/values"
    for label, value in (
        ("model", identity.name),
        ("digest", identity.digest),
        ("folder", str(folder)),
        ("weights", output.size_text(size_bytes)),
        ("architecture", config.architecture),
        ("shape", f"{shape}, {heads}"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("context", f"{config.max_positions:,} tokens"),
    ):
        table.add_row(Text(label, style="bold"), Text(value))
    output.stdout.print(table)
