"""Proves that the generated code in schemas/ is what schemas/*.proto make. `make lint` runs it; `make proto` mends a drift."""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ("schemas/v1/inference.proto", "schemas/v1/events.proto")
GENERATED = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py", "events_pb2.py", "events_pb2.pyi")


def main() -> int:
    with tempfile.TemporaryDirectory() as out:
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
        subprocess.run([*protoc, f"--python_out={out}", f"--pyi_out={out}", *PROTOS], cwd=ROOT, check=True)
        subprocess.run([*protoc, f"--grpc_python_out={out}", PROTOS[0]], cwd=ROOT, check=True)
        _, changed, missing = filecmp.cmpfiles(Path(out) / "schemas/v1", ROOT / "schemas/v1", GENERATED, shallow=False)
    for name in (*changed, *missing):
        print(f"schemas/v1/{name} is not what the .proto makes: run `make proto`", file=sys.stderr)
    return 1 if changed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
