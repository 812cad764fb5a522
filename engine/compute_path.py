"""`python -m engine.compute_path DEVICE CPU_ISA NUM_THREADS`: what would compute here and why, without loading a model.

One JSON object a line on standard output: `{"doing": ...}` while operators are being built, then the findings. Exits 2 with the reason
on standard error when the device or the instruction set cannot be had.
"""

import json
import os
import platform
import sys

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.openmp import prefer_short_spin


def look(device_name: str, cpu_isa: str, num_threads: int) -> dict[str, object]:
    """Binds the operators as the engine would, building them first if they are not there. Raises `ConfigError`."""
    import torch

    from engine.engine import bind_operators, resolve_device
    from engine.execution.threads import set_compute_threads

    device = resolve_device(device_name)
    config = EngineConfig(model_dir="-", cpu_isa=cpu_isa)  # type: ignore[arg-type]
    operators = bind_operators(config, device, lambda _, doing: print(json.dumps({"doing": doing}), flush=True))
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "on_cpu": device.type == "cpu",
        "operators": operators.name,
        "reason": operators.reason,
        "threads": set_compute_threads(num_threads),
        "waiting": {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ},
    }


def main() -> int:
    """Prints what `look` finds."""
    device, cpu_isa, num_threads = sys.argv[1:]
    prefer_short_spin()
    try:
        print(json.dumps(look(device, cpu_isa, int(num_threads))))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
