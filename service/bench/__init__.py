"""Load against a running endpoint, and what it measured: the engine room of `sluice bench`. Knows no terminal."""
