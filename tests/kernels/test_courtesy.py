"""Threads that compute give their core up once a millisecond, and not where others want it all the time.

Counted by a library that stands in front of the C library's `sched_yield`, and of its `pread` for what the system says of waiting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import choose
from kernels.cpu.build import library_path

IN_FRONT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int yields;

int counted_yields(void) { return __atomic_load_n(&yields, __ATOMIC_SEQ_CST); }

int sched_yield(void) {
    __atomic_add_fetch(&yields, 1, __ATOMIC_SEQ_CST);
    return 0;
}

/* schedstat says what WAITED asks for: a share of all time in hundredths, or nothing. */
ssize_t pread(int file, void* into, size_t size, off_t offset) {
    char link[64], name[256] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, name, sizeof name - 1) > 0 && strstr(name, "schedstat")) {
        const char* share = getenv("WAITED");
        if (!*share) return -1;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return snprintf(into, size, "1 %lld 1\n", (now.tv_sec * 1000000000LL + now.tv_nsec) / 100 * atoi(share));
    }
    return ((ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(file, into, size, offset);
}
"""

COMPUTES = """
import ctypes, json, sys, time
import torch

torch.ops.load_library(sys.argv[1])
torch.ops.sluice_cpu.select(torch.ops.sluice_cpu.available()[0])
torch.set_num_threads(1)  # more would yield where they wait for one another
weight = torch.ones(256, 256)
packed, x = torch.ops.sluice_cpu.pack(weight, "float32", False, 0), torch.ones(64, 256)
counted = ctypes.CDLL(None).counted_yields
start, before = time.perf_counter(), counted()
while time.perf_counter() < start + 0.5:
    torch.ops.sluice_cpu.linear(x, packed, None, 0.0, None, None, None)
print(json.dumps({"yields": counted() - before, "ms": (time.perf_counter() - start) * 1e3}))
"""


@pytest.fixture(scope="module")
def in_front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choose("auto")
    folder = tmp_path_factory.mktemp("in-front")
    (folder / "in_front.c").write_text(IN_FRONT, "utf-8")
    library = folder / "in_front.so"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "in_front.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def computed(in_front: Path, waited: str) -> dict[str, float]:
    """What half a second of a thread's products counted, with `waited` hundredths of all time in the queue ("": nobody says)."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTES, str(library_path())],
        env=os.environ | {"LD_PRELOAD": str(in_front), "WAITED": waited},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("waited", ["0", "20"])
def test_threads_give_way_at_most_once_a_millisecond(in_front: Path, waited: str) -> None:
    found = computed(in_front, waited)
    assert 1 < found["yields"] <= found["ms"] + 1


@pytest.mark.parametrize("waited", ["30", "100", ""])
def test_threads_that_wait_for_their_core_already_do_not(in_front: Path, waited: str) -> None:
    assert computed(in_front, waited)["yields"] == 0
