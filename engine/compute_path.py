"""`python -m engine.compute_path CONFIG`: what would compute here and why, and whether the model would load, without loading it.

CONFIG is an `EngineConfig` as JSON. One JSON object a line on standard output: `{"doing": ...}` while operators are being built, then the
findings. Exits 2 with the reason on standard error where the engine would refuse the configuration.
"""

import json
import os
import platform
import sys

import msgspec

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.openmp import prefer_short_spin


def look(config: EngineConfig) -> dict[str, object]:
    """Binds the operators as the engine would, building them first if they are not there. Raises `ConfigError`.

    "model_fault": why the model directory would not load; "" where it would, and for the stand-in, which loads none.
    """
    import torch

    from engine.attention.registry import check_backend
    from engine.engine import bind_operators, check_model, resolve_device
    from engine.execution.threads import set_compute_threads

    device = resolve_device(config.device)
    paged = config.kind == "paged"
    if paged:
        check_backend(config.attention_backend, device)
    operators = bind_operators(config, device, lambda _, doing: print(json.dumps({"doing": doing}), flush=True))
    model_fault = ""
    try:
        if paged:
            check_model(config, device, operators)
    except CheckpointError as error:
        model_fault = str(error)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "on_cpu": device.type == "cpu",
        "operators": operators.name,
        "reason": operators.reason,
        "threads": set_compute_threads(config.num_threads),
        "waiting": {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ},
        "model_fault": model_fault,
    }


def main() -> int:
    """Prints what `look` finds."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    prefer_short_spin()
    try:
        print(json.dumps(look(config)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
