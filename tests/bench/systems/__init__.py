"""One file a system under comparison: a process that loads a model, runs batches, and says when each token came.

Each file runs in that system's own environment, so it imports nothing of ours but its neighbour `speaking`.
"""
