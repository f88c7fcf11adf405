"""`python -m services.scheduler`."""

from services.common.config import load_settings
from services.common.server import serve
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import start


def main() -> None:
    """Run the scheduler until a signal."""
    settings = load_settings(SchedulerSettings)
    serve("scheduler", settings, lambda: start(settings))


if __name__ == "__main__":
    main()
