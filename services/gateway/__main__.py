"""Runs the gateway as a process."""

import sys

from services.common.base_model import BaseModelError
from services.common.config import load_settings
from services.common.server import serve
from services.gateway.config import GatewaySettings
from services.gateway.service import start


def main() -> None:
    """Serve until SIGTERM; exit 1 with one line when the base model can't be used."""
    settings = load_settings(GatewaySettings)
    try:
        serve("gateway", settings, lambda: start(settings))
    except BaseModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
