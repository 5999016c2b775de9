"""The paged KV cache: block identity, residency index, device pool."""
