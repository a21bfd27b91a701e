# mrmae for one GPU or many: torch's wheels bring CUDA, the host brings the driver (NVIDIA Container Toolkit).
# docs/cluster.md says how to build and start it; tests/test_container.py does its steps without Docker.
FROM python:3.12-slim

# compile=true needs a C compiler when it runs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE cli.py ./
COPY pipeline ./pipeline
COPY stages ./stages
COPY benchmarks ./benchmarks
RUN python -m pip install --no-cache-dir --constraint constraints.txt '.[remote]' && rm -rf /src

# The configs of the README, where the commands are started.
WORKDIR /project
COPY configs ./configs

# Weights and kept lists: mount a disk here, or each container fetches and lists anew.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
CMD ["mrmae", "--help"]
