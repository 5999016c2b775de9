"""What needs a GPU, measured in one command: `bench/gpu/suite.sh` (see `suite`)."""
