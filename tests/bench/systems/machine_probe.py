"""The machine itself as a system: probed before every block."""

from probing import Probe
from speaking import serve

if __name__ == "__main__":
    serve(Probe)
