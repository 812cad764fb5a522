"""Makes one step's plan: who runs, how many tokens each, which blocks, who gives way and who is let in.

The `Scheduler`'s inner half: it owns the running and waiting order, the slots and the block pool, and changes them only inside
`plan`, `retract` and `leave`, which the scheduler calls at step boundaries. Guarantees I1, I3 and I9 of a plan.
Shortage of blocks: the one who needs a block first makes do with what is free, then the last in policy order is preempted; who
finds no victim keeps its blocks and sits the step out. Nobody is let in during a step that was short. The oldest running
sequence is served first and never gives way, so it always advances, or one that holds all it needs does (`policy`).
A plan may be made while the one before it is under way: then each of its sequences counts as having computed its chunk, nobody is
preempted, and whoever finds no block sits the step out.
"""

from collections.abc import Sequence as Seq

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.policy import MAX_PREEMPTIONS, pick_victim
from engine.scheduling.prefix_cache import extend_hashes, max_cached_blocks
from engine.scheduling.sequence import Sequence
from engine.scheduling.step import Chunk, SequenceStart, StepPlan
from engine.scheduling.waiting import MAX_OVERTAKES, MAX_SKIPPED, OrderedSequences


class Planner:
    """`running`, `waiting`, `slots` and `was_short` are for the scheduler to read; `token_budget` for it to set."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._max_chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        self._preferred = config.preferred_num_seqs or config.max_num_seqs
        self._watermark_blocks = int(config.num_blocks * config.watermark)
        self.token_budget = config.max_num_batched_tokens
        self.pool = BlockPool(config.num_blocks)
        self.running = OrderedSequences()
        self.waiting = OrderedSequences()
        self.slots: list[Sequence | None] = [None] * config.max_num_seqs
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._starts: list[SequenceStart] = []
        self._single: list[Chunk] = []
        self._longer: list[Chunk] = []
        self._ahead = False
        self.was_short = False

    def plan(self, step: int, roots: dict[str, bytes], now_ns: int, *, ahead: bool = False) -> StepPlan:
        """The next step. `roots`: each live request's hash root. `ahead`: the plan before is under way.

        Without `ahead` it has no chunk only if nothing runs and nothing waits. `was_short` tells whether somebody lacked blocks in it.
        """
        self._starts, self._single, self._longer = [], [], []
        self._ahead, self.was_short = ahead, False
        left = self._run_running(self.token_budget)
        if left and self.waiting.items and self._free_slots and not self.was_short:
            self._let_in(left, roots, now_ns)
        chunks = self._single
        chunks.extend(self._longer)
        return StepPlan(step=step, starts=tuple(self._starts), chunks=tuple(chunks))

    def singles_follow(self, now_ns: int) -> bool:
        """Whether a plan made now can but hold single tokens of what runs."""
        waiting = self.waiting.items
        may_let_in = bool(waiting and self._free_slots) and not self._held_back(waiting[0], now_ns)
        return not may_let_in and all(
            len(sequence.token_ids) - sequence.num_computed_tokens - sequence.num_scheduled_tokens <= 1
            for sequence in self.running.items
        )

    def retract(self, plan: StepPlan) -> None:
        """The plan was not computed, nor will be what is under way: its sequences keep their blocks and start anew in the next plan."""
        for chunk in plan.chunks:
            sequence = self.slots[chunk.slot]
            if sequence is not None:
                sequence.num_scheduled_tokens = 0
                sequence.start_anew()

    def leave(self, sequence: Sequence) -> None:
        """The sequence ended: it gives up its slot and blocks, or its place in the queue."""
        if sequence.slot >= 0:
            self._free(sequence)
        else:
            self.waiting.remove(sequence)

    def _run_running(self, left: int) -> int:
        items = self.running.items
        if not items:
            return left
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        oldest = items[0]
        for sequence in items:
            if sequence.arrival < oldest.arrival:
                oldest = sequence
            # 0: a chunk under way draws the next token.
            if len(sequence.token_ids) - sequence.num_computed_tokens - sequence.num_scheduled_tokens <= 1:
                decodes.append(sequence)
            else:
                prefills.append(sequence)
        share = left - len(decodes) if prefills and oldest in prefills else left
        left -= self._run(oldest, max(share, 1), oldest)
        for sequence in decodes:
            if left and sequence is not oldest and sequence.slot >= 0:
                left -= self._run(sequence, 1, oldest)
        for sequence in prefills:
            if left and sequence is not oldest and sequence.slot >= 0:
                left -= self._run(sequence, left, oldest)
        return left

    def _run(self, sequence: Sequence, limit: int, oldest: Sequence) -> int:
        """Schedules as many of its tokens as share, budget and blocks allow; gives how many (0: it sits this step out)."""
        start = sequence.num_computed_tokens + sequence.num_scheduled_tokens
        num_left = len(sequence.token_ids) - start
        follows = num_left == 0
        if follows:
            if start + 1 >= sequence.max_total_tokens:
                return 0
            num_left = 1
        num_new = min(num_left, limit, self._max_chunk)
        if start + num_new > len(sequence.block_ids) * self._config.block_size:
            num_new = self._grow(sequence, start, start + num_new, oldest) - start
            if num_new == 0:
                return 0
        if sequence.needs_start:
            self._starts.append(_start_of(sequence))
            sequence.needs_start = False
        new_blocks: tuple[int, ...] = ()
        if len(sequence.block_ids) > sequence.num_sent_blocks:
            new_blocks = tuple(sequence.block_ids[sequence.num_sent_blocks :])
            sequence.num_sent_blocks = len(sequence.block_ids)
        sequence.num_scheduled_tokens += num_new
        chunk = Chunk(
            slot=sequence.slot,
            start=start,
            num_tokens=num_new,
            new_block_ids=new_blocks,
            samples=num_new == num_left,
            follows=follows,
        )
        (self._single if num_new == 1 else self._longer).append(chunk)
        return num_new

    def _grow(self, sequence: Sequence, start: int, end: int, oldest: Sequence) -> int:
        """Extends its block table, which covers `start`, towards `end` tokens; gives the end that it covers then, at most `end`."""
        block_size, held = self._config.block_size, len(sequence.block_ids)
        if held * block_size == start:
            while not self.pool.num_available:
                self.was_short = True
                victim = None if self._ahead else pick_victim(self.running.items, sequence, oldest)
                if victim is None:
                    return start
                self._preempt(victim)
        needed = self._config.num_blocks_for(end) - held
        taken = min(needed, self.pool.num_available)
        if taken < needed:
            self.was_short = True
        sequence.block_ids.extend(self.pool.allocate(taken))
        return min(end, (held + taken) * block_size)

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.slots[sequence.slot] = None
        self._free_slots.append(sequence.slot)
        self.pool.release(sequence.block_ids)
        sequence.give_up_slot()

    def _let_in(self, left: int, roots: dict[str, bytes], now_ns: int) -> None:
        """Lets waiting sequences in by the rule of `waiting`. One fits when all its known tokens do, beside what running prefills
        still need and the watermark; with nothing running the first always fits (I7, I9). Nobody passes one that is held back."""
        config, items = self._config, self.waiting.items
        spare = self.pool.num_available
        for sequence in self.running.items:
            spare -= max(0, config.num_blocks_for(len(sequence.token_ids)) - len(sequence.block_ids))
        skipped: list[Sequence] = []
        i = 0
        while left and self._free_slots and i < len(items) and len(skipped) < MAX_SKIPPED:
            sequence = items[i]
            if self._held_back(sequence, now_ns):
                return
            keeps_all = sequence.num_preemptions >= MAX_PREEMPTIONS
            hits = self._find_cached(sequence, roots)
            end = sequence.max_total_tokens if keeps_all else len(sequence.token_ids)
            needed = config.num_blocks_for(end) - len(hits) + self.pool.count_evictable(hits)
            if needed > spare - (self._watermark_blocks if self.running.items else 0):
                if keeps_all or sequence.num_overtaken >= MAX_OVERTAKES:
                    return
                skipped.append(sequence)
                i += 1
                continue
            spare -= needed
            del items[i]
            for passed in skipped:
                passed.num_overtaken += 1
            self._enter(sequence, hits, now_ns)
            if keeps_all:
                sequence.block_ids.extend(self.pool.allocate(config.num_blocks_for(end) - len(hits)))
            left -= self._run(sequence, left, sequence)

    def _held_back(self, sequence: Sequence, now_ns: int) -> bool:
        """Whether it waits, though there may be room, for one of those that run to end: it has come just now, and with so many running
        one more makes all of them slower."""
        return len(self.running) >= self._preferred and now_ns - sequence.added_ns < self._config.max_queue_delay_ns

    def _find_cached(self, sequence: Sequence, roots: dict[str, bytes]) -> list[int]:
        if not self._config.enable_prefix_cache:
            return []
        block_size = self._config.block_size
        extend_hashes(sequence.block_hashes, roots[sequence.request.request_id], sequence.token_ids, block_size)
        return self.pool.find(sequence.block_hashes, max_cached_blocks(len(sequence.token_ids), block_size))

    def _enter(self, sequence: Sequence, hits: Seq[int], now_ns: int) -> None:
        self.pool.share(hits)
        sequence.block_ids = list(hits)
        sequence.num_published_blocks = len(hits)
        sequence.num_computed_tokens = len(hits) * self._config.block_size
        sequence.num_prefill_tokens = len(sequence.token_ids)
        sequence.num_overtaken = 0
        sequence.slot = self._free_slots.pop()
        self.slots[sequence.slot] = sequence
        self.running.add(sequence)
        if sequence.num_steps == 0 and sequence.first_scheduled_ns == 0:
            sequence.first_scheduled_ns = now_ns
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self._config.enable_prefix_cache:
                self.num_prefix_query_tokens += len(sequence.token_ids)
                self.num_prefix_hit_tokens += sequence.num_computed_tokens


def _start_of(sequence: Sequence) -> SequenceStart:
    return SequenceStart(
        slot=sequence.slot,
        token_ids=tuple(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        choice=sequence.choice,
        sampling=sequence.request.sampling,
        stop_token_ids=sequence.stop_token_ids,
    )
