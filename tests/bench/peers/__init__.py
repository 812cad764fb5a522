"""The benchmark against peers: environments, systems, interleaved blocks, and what the blocks come to."""
