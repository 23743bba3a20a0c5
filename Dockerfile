# Two images from one file: `api` (no torch) and `worker`.
#   docker build --target api -t ratchet-api .
#   docker build --target worker -t ratchet-worker .
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The project as a wheel: what runs in the images is what a user of the package gets.
FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY ratchet_client ratchet_client
COPY service service
COPY workers workers
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# What it depends on. This and the next stage are made anew only when pyproject.toml or constraints.txt change.
FROM ${BASE_IMAGE} AS dependencies
# One package of the extra reasoning-gym compiles.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = p["optional-dependencies"]; print(*p["dependencies"], *extras["reasoning-gym"], *extras["otel"], *extras["s3"], sep="\n")' > requirements.txt \
 && pip install --no-cache-dir -c constraints.txt -r requirements.txt

FROM dependencies AS worker-dependencies
# The package index's own torch runs on CUDA and on CPUs. A much smaller one, for CPUs only:
#   --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=""
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["optional-dependencies"]["worker"], sep="\n")' > requirements-worker.txt \
 && pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
      -c constraints.txt -r requirements-worker.txt

FROM ${BASE_IMAGE} AS runtime
# tini reaps what a killed worker leaves behind and hands signals on.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin ratchet \
 && install -d -o ratchet -g ratchet /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    RATCHET_DATA_DIR=/data
WORKDIR /opt/ratchet
ENTRYPOINT ["tini", "--"]

FROM runtime AS api
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps /dist/*.whl
USER 10001
ENV RATCHET_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "service"]

FROM runtime AS worker
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps /dist/*.whl
USER 10001
ENV HF_HOME=/data/huggingface
HEALTHCHECK --interval=30s --timeout=20s --start-period=90s --retries=3 \
  CMD ["sh", "-c", "celery -A workers.app inspect ping --timeout 10 --destination celery@$(hostname)"]
CMD ["celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle"]
