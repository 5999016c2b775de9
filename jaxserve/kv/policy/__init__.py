"""Which block leaves a full tier, and which may enter it."""
