"""The decisions of Calumma, pure: no I/O, no clock, no randomness, no logging, no protobuf.

Two machines decide everything. `ClusterScheduler` (in the scheduler service) admits, queues and
places requests; `ReplicaScheduler` (in each worker) forms step batches and owns the memory pool.
Both take events with `handle(event, now=...)`, return decisions that are performed in order, and
say with `next_deadline()` when `tick(now=...)` must be called without an event. Times are seconds
of one monotonic clock that the caller owns. The simulator runs these very objects.
"""
