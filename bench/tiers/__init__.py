"""What `bench.kv_tiers` measures: workloads on engines in process, and the machine's own limits."""
