"""Carries a plan out: each fault at its time, several at once where they last, and never what the cluster may not survive.

One broker is away at a time, and only while every copy is in sync: two would take the brokers' own promise away. A barrier waits for
the faults that hold replicas, and holds all of them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tests.chaos.history import Barrier
from tests.chaos.plan import Fault, Plan
from tests.chaos.proxy import ENDING_KEYS, BrokerProxy, Trap
from tests.chaos.replica import Replica, ReplicaError
from tests.chaos.run_clock import RunClock
from tests.chaos.scene import Scene

_WATCH_S = 0.3
_TICK_S = 0.1
_TRAP_S = 20.0
_SERVING_S = 8.0


class Faults:
    """`run` is the timeline. `carried_out` counts what was really done, `crashes` what ended without being asked to."""

    def __init__(self, scene: Scene, plan: Plan, clock: RunClock) -> None:
        """`clock` is stopped while every replica is held by a fault that keeps it from serving."""
        self._scene, self._plan, self._clock = scene, plan, clock
        self._holds = {replica.number: asyncio.Lock() for replica in scene.replicas}
        self._brokers = asyncio.Lock()
        self._extras = 0
        self.carried_out: Counter[str] = Counter()
        self.crashes: list[str] = []
        self.barriers: list[Barrier] = []

    async def run(self) -> None:
        """Returns once every fault has come and gone and all replicas run."""
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as running:
                for fault in self._plan.faults:
                    while (wait_s := fault.at_s - self._clock.elapsed()) > 0:  # noqa: ASYNC110 - the clock may stand still
                        await asyncio.sleep(min(wait_s, _TICK_S))
                    running.create_task(self._carry_out(fault), name=f"fault {fault.kind}")
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        self._calm()

    def summary(self) -> dict[str, Any]:
        """For the JSON report."""
        carried_out = dict(sorted(self.carried_out.items()))
        return {"carried_out": carried_out, "commits_trapped": self._num_trapped, "crashes": self.crashes}

    @property
    def _num_trapped(self) -> int:
        return sum(proxy.num_trapped for proxy in self._scene.proxies.each)

    async def _carry_out(self, fault: Fault) -> None:
        acts: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "pause": self._pause,
            "term": self._term,
            "engine": self._engine,
            "extra": self._extra,
            "broker-kill": self._broker_kill,
            "delete-input": self._delete_input,
            "barrier": self._barrier,
        }
        await acts.get(fault.kind, self._network)(fault)
        self.carried_out[fault.kind] += 1

    async def _kill(self, fault: Fault) -> None:
        async with self._hold(fault) as replica:
            await replica.kill()
            await asyncio.sleep(fault.for_s)
            await self._start(replica)

    async def _pause(self, fault: Fault) -> None:
        async with self._hold(fault) as replica:
            replica.pause()
            await asyncio.sleep(fault.for_s)
            replica.go_on()

    async def _term(self, fault: Fault) -> None:
        async with self._hold(fault) as replica:
            self._stopped(await replica.terminate())
            await self._start(replica)

    async def _start(self, replica: Replica) -> None:
        try:
            await replica.start()
        except ReplicaError as error:
            self.crashes.append(str(error))
            return
        # One that has just started has nothing to lose yet: the next fault finds it at work, unless the brokers are away.
        await replica.serving(_SERVING_S)

    def _stopped(self, fault: str) -> None:
        if fault:
            self.crashes.append(fault)

    async def _engine(self, fault: Fault) -> None:
        async with self._hold(fault) as replica:
            replica.kill_engine()

    async def _extra(self, fault: Fault) -> None:
        self._extras += 1
        replica = Replica(len(self._scene.replicas) + self._extras, self._scene.settings)
        try:
            await replica.start()
            await asyncio.sleep(fault.for_s)
            self._stopped(await replica.terminate())
        finally:
            await replica.kill()

    async def _broker_kill(self, fault: Fault) -> None:
        async with self._brokers:
            await self._scene.in_sync()
            broker = self._scene.brokers.brokers[fault.target % len(self._scene.brokers.brokers)]
            await asyncio.to_thread(broker.stop, kill=True)
            await asyncio.sleep(fault.for_s)
            await asyncio.to_thread(broker.start)
            await self._scene.in_sync()

    async def _delete_input(self, _: Fault) -> None:
        async with self._brokers:
            await asyncio.to_thread(self._scene.delete_input)

    async def _barrier(self, _: Fault) -> None:
        async with self._brokers:
            for replica in self._scene.replicas:
                await self._holds[replica.number].acquire()
            self._clock.stop()
            try:
                await self._scene.kill_replicas()
                self.barriers += await self._scene.barrier(f"barrier {len(self.barriers) // self._scene.shape.partitions + 1}")
                await asyncio.gather(*(self._start(replica) for replica in self._scene.replicas))
            finally:
                self._clock.go_on()
                for lock in self._holds.values():
                    lock.release()

    async def _network(self, fault: Fault) -> None:
        proxies = self._scene.proxies
        one = proxies.each[fault.target % len(proxies.each)]
        if fault.kind == "cut":
            await one.cut()
        elif fault.kind == "half-open":
            one.freeze()
            await asyncio.sleep(fault.for_s)
            await one.cut()
            one.thaw()
        elif fault.kind in ("delay", "slow-commits"):
            name = "delay_s" if fault.kind == "delay" else "commit_delay_s"
            proxies.apply(lambda proxy: setattr(proxy, name, fault.amount))
            await asyncio.sleep(fault.for_s)
            proxies.apply(lambda proxy: setattr(proxy, name, 0.0))
        else:
            trap = Trap(kind="late" if fault.kind == "late-commit" else "lost-answer", keys=ENDING_KEYS, delay_s=fault.amount)
            proxies.apply(lambda proxy: proxy.arm(trap))
            # Until something has walked into one: a slow machine has long moments in which nobody commits.
            until, before = time.monotonic() + max(fault.for_s, _TRAP_S), self._num_trapped
            while self._num_trapped == before and time.monotonic() < until:  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(_WATCH_S)
            proxies.apply(BrokerProxy.disarm)

    def _calm(self) -> None:
        def calm(proxy: BrokerProxy) -> None:
            proxy.delay_s = proxy.commit_delay_s = 0.0
            proxy.disarm()
            proxy.thaw()

        self._scene.proxies.apply(calm)

    def _hold(self, fault: Fault) -> "_Hold":
        return _Hold(self._scene.replicas, self._holds, fault.target, self._clock)

    async def _watch(self) -> None:
        """A replica that ends by itself is a finding; it is started again, so that the run goes on."""
        while True:
            for replica in self._scene.replicas:
                lock = self._holds[replica.number]
                if lock.locked() or replica.alive:
                    continue
                async with lock:
                    self.crashes.append(f"replica {replica.number} ended by itself: {replica.tail(600)}")
                    try:
                        await replica.start()
                    except ReplicaError as error:
                        self.crashes.append(str(error))
            await asyncio.sleep(_WATCH_S)


class _Hold:
    """A replica that nothing else acts on: the one aimed at, or the next that is free."""

    def __init__(self, replicas: list[Replica], locks: dict[int, asyncio.Lock], target: int, clock: RunClock) -> None:
        self._locks, self._clock = locks, clock
        order = [replicas[(target + step) % len(replicas)] for step in range(len(replicas))]
        free = [replica for replica in order if not locks[replica.number].locked()]
        self._replica = (free or order)[0]
        self._lock = locks[self._replica.number]

    async def __aenter__(self) -> Replica:
        await self._lock.acquire()
        if all(lock.locked() for lock in self._locks.values()):
            self._clock.stop()
        return self._replica

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
        self._clock.go_on()
