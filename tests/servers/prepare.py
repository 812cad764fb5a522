"""Fetches and builds what the tests run against, once: the real model, the C++ operators, Apache Kafka, Jaeger. `make test` calls it.

As root on Debian it installs what Debian has (Java, Maven). Otherwise each missing tool is named in one line and the exit code
is 3: nothing is skipped in silence.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.cpu import choose
from kernels.cpu.build import runnable
from service.cli.demo_model import ensure_demo_model
from service.errors import SetupError
from tests.servers import jaeger, kafka

DEBIAN = {"g++": "g++", "java": "default-jre-headless", "mvn": "maven"}
KAFKAS_OWN = ("java", "mvn")
SIMDE = Path("/usr/include/simde/x86/avx512.h")
"""What emulates the instruction sets that this processor lacks, for the tests of the operators."""


def main() -> int:
    unneeded = KAFKAS_OWN if kafka.external() else ()
    missing = [DEBIAN[tool] for tool in DEBIAN if tool not in unneeded and shutil.which(tool) is None]
    _install(missing if SIMDE.exists() else [*missing, "libsimde-dev"])
    # The model waits on the network and the Jaeger build on the processor: side by side.
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(_told, "the model", ensure_demo_model), pool.submit(_told, "the C++ operators", _operators)]
        if not kafka.external():
            jobs.append(pool.submit(_told, f"Apache Kafka {kafka.VERSION}", kafka.prepare))
        if not os.environ.get(jaeger.ENVIRONMENT):
            jobs.append(pool.submit(_told, f"Jaeger {jaeger.VERSION}", jaeger.binary))
        failed = [
            error for job in jobs if isinstance(error := job.exception(), SetupError | kafka.ServerError | jaeger.ServerError)
        ]
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if failed:
        return 3
    for job in jobs:
        job.result()
    return 0


def _operators() -> None:
    """Built now, so that no test waits for the compiler. Without one the engine is tested on plain torch."""
    choice = choose("auto")
    if not choice.instruction_set:
        print(f"the engine is tested on {choice.reason}", flush=True)
        return
    for name in runnable():
        choose(name)


def _told(what: str, prepare: object) -> None:
    start = time.monotonic()
    assert callable(prepare)
    prepare()
    if (took := time.monotonic() - start) > 1:
        print(f"{what} is ready ({took:.0f} s)", flush=True)


def _install(packages: list[str]) -> None:
    if not packages or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(packages)} with apt-get …", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    sys.exit(main())
