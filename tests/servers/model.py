"""The real model of the tests: SmolLM2-135M-Instruct, fetched and imported once per machine."""

from pathlib import Path

from service.cli.demo_model import ensure_demo_model


def model_dir() -> Path:
    """Its Hugging Face directory. Fails when it cannot be made: a test that needs it never skips."""
    return ensure_demo_model()
