"""The parts of `bench.peers_cpu`: other engines beside jaxserve, on one checkpoint.

Every engine, in a worker process or behind a server, does one thing for the bench: run a batch
of prompts and say when each token came (`workload.Run`). `measures` says what that comes to.
"""
