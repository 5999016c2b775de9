"""Load for any OpenAI server, and the engine's own speed in process: `jaxserve bench`."""
