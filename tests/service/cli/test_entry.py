"""Starting the `sluice` command: quiet when it is interrupted, and light."""

import json
import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from service.cli.entry import main
main()
"""
LOADED = """
import json, sys
sys.argv = ["sluice", *sys.argv[1:], "--help"]
from service.cli.entry import main
try:
    main()
except SystemExit:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def test_an_interruption_while_the_commands_load_ends_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["stream"], {"torch", "transformers", "triton", "numpy", "tokenizers", "aiokafka", "confluent_kafka", "uvloop"}),
        (["attach"], {"torch", "transformers", "triton", "numpy", "tokenizers", "aiokafka", "confluent_kafka", "uvloop"}),
        (["publish"], {"torch", "transformers", "triton", "numpy", "tokenizers"}),
        ([], {"torch", "transformers", "triton", "numpy"}),
    ],
    ids=["stream", "attach", "publish", "all"],
)
def test_a_command_loads_what_it_needs(command: list[str], absent: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *command], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr))
    assert (loaded & absent, "typer" in loaded, "Usage:" in done.stdout) == (set(), True, True)
