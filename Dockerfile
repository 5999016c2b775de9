# The README's two commands in a container: `make .venv/.installed` builds, `jaxserve serve` runs.
#   docker build -t jaxserve . && docker compose up
FROM python:3.12-slim-bookworm AS build

# g++: the CPU kernels are compiled at first use. Versions are Debian's own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/jaxserve
COPY . .
RUN make .venv/.installed

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/jaxserve jaxserve \
    && install -d -m 0700 -o jaxserve -g jaxserve /var/cache/jaxserve /var/lib/jaxserve/kv

COPY --from=build /opt/jaxserve /opt/jaxserve

# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/jaxserve
ENV XDG_CACHE_HOME=/var/cache/jaxserve \
    HF_HOME=/var/cache/jaxserve/huggingface \
    PATH=/opt/jaxserve/.venv/bin:$PATH

# Compiled programs and downloaded checkpoints; and the KV blocks, which outlive the container.
VOLUME ["/var/cache/jaxserve", "/var/lib/jaxserve/kv"]
EXPOSE 8000

# /health answers 503 until the model is loaded and compiled.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Every address of the container: so a key is needed, as JAXSERVE_API_KEY.
ENTRYPOINT ["jaxserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
