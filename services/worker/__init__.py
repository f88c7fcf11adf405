"""The worker: one replica of the base model, its adapters and the loop that steps it.

Owns the engine, the memory pool of KV cache and adapters, the adapters in host memory, and the
tokens of running requests until their gateways have them. It dials the scheduler (`Attach`), from
which requests come, and the adapter store (`Download`); gateways dial it for tokens
(`StreamTokens`), operators and clients of `calumma` for `GetState` and `Drain`.

The life of a request here: `attach` takes it in and `wire` checks it; `driver` hands it to the pure
`ReplicaScheduler` and performs what that decides; `residency` brings its adapter; `engine_thread`
runs the steps; `requests` says when it is complete and `roster` who must hear of it; `outputs` and
`streams` carry its tokens out.
"""
