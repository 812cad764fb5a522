"""A step's flat batch as the host makes it, before it goes to the device."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ON_DEVICE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """Shapes and meanings as in `AttentionMetadata`; input_ids, positions and slots (of requests): [num_tokens] int64.

    An id of `ON_DEVICE` is what the step before drew in that slot. `rows`: [num_logits] int64, the tokens whose logits are wanted.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    rows: NDArray[np.int64]
    num_single_token_chunks: int
    max_query_len: int
    max_seq_len: int
