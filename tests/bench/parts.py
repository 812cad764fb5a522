"""The report of a benchmark of many parts on a machine that is lent for minutes: one that fails, or hangs, takes no other along."""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.bench import report

Figures = dict[str, Any]


@dataclass
class Document:
    """What a benchmark prints in the end. Written anew after each part, so that a machine that goes away takes nothing along."""

    name: str
    file: Path
    parameters: Figures
    commit: str
    results: Figures = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    environment: Figures = field(default_factory=report.environment)

    def part(self, name: str, measure: Callable[[], Figures]) -> None:
        """Its figures and seconds, or its traceback."""
        began = time.perf_counter()
        try:
            found = measure()
        except Exception:  # noqa: BLE001 - the other parts are worth having
            found = {"error": traceback.format_exc()}
        self.results[name] = found | {"took_s": round(time.perf_counter() - began, 1)}
        print(name, json.dumps(self.results[name]), file=sys.stderr, flush=True)
        self.write()

    def as_json(self) -> Figures:
        document = report.emit(self.name, self.parameters, self.results, self.environment)
        environment = document["environment"]
        environment["commit"] = self.commit or environment["commit"]
        environment["versions"] |= {name: version(name) for name in ("confluent-kafka", "protobuf")}
        if torch.cuda.is_available():
            environment |= {"gpu": torch.cuda.get_device_name(0), "gpu_bytes": torch.cuda.get_device_properties(0).total_memory}
        return document

    def write(self) -> None:
        self.file.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @property
    def failed(self) -> bool:
        return any("error" in found for found in self.results.values())

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began


@contextmanager
def ending_within(limit_s: float, document: Document) -> Iterator[None]:
    """The block, or the end of this process so many seconds from now."""
    # Should this thread of Python's not get its turn either, faulthandler's own ends the process.
    faulthandler.dump_traceback_later(limit_s + 10, exit=True)
    late = threading.Timer(limit_s, _end_late, (document,))
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        faulthandler.cancel_dump_traceback_later()


def _end_late(document: Document) -> None:
    """Says what there is and where every thread stands, and ends. What is tied to this process ends with it."""
    document.results["limit"] = {"error": f"not done after {document.elapsed_s:.0f} s"}
    faulthandler.dump_traceback(sys.stderr)
    document.write()
    report.print_report(document.as_json())
    sys.stdout.flush()
    os._exit(1)
