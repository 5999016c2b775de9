"""Secondary tiers behind the host tier: disk, object stores, remote key-value servers."""
