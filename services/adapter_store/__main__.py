"""`python -m services.adapter_store`."""

import sys

from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.service import start
from services.common.base_model import BaseModelError
from services.common.config import load_settings
from services.common.memory import keep_freed_memory
from services.common.server import serve


def main() -> None:
    settings = load_settings(AdapterStoreSettings)
    keep_freed_memory()
    try:
        serve("adapter_store", settings, lambda: start(settings))
    except (BaseModelError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
