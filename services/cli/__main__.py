"""`calumma`, and `python -m services.cli`."""

import os
import sys

from services.cli.app import app
from services.cli.output import CommandError, show_error


def main() -> None:
    """Run one command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        app(prog_name="calumma")
    except Exception as error:
        if os.environ.get("CALUMMA_DEBUG"):
            raise
        hint = "CALUMMA_DEBUG=1 shows where; please report it"
        show_error(CommandError(f"internal error: {type(error).__name__}: {error}", hint=hint))
        sys.exit(1)


if __name__ == "__main__":
    main()
