"""OpenAI batch files: many requests in one file, their answers in another: `jaxserve run-batch`."""
