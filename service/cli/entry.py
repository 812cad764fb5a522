"""The console script: loads the commands, and is quiet when it is interrupted meanwhile (exit code 130)."""

import os
import signal


def main() -> None:
    """Runs `service.cli.main`."""
    # Nothing is open yet that would have to be closed, and no import may swallow the interruption or show a traceback of it.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from service.cli.main import main as run

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    run()
