# One image for every node: the agent and its workers.
#
#   docker build -t elastic-pt .                                          torch from the default package index
#   docker build -t elastic-pt --build-arg PIP_EXTRA_INDEX_URL=URL .      another index first, such as torch's CPU one
#   docker build -t elastic-pt --build-arg EXTRAS='[gcs]' .               with the client of another bucket
#
# It runs with a read-only root file system. It writes to /tmp (cached token shards, sockets) and to
# /dev/shm (states in memory), so give both enough room; Docker's default /dev/shm of 64 MB is too small.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=
ARG EXTRAS=
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN ["python3", "-m", "venv", "/opt/venv"]
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY elastic_pt ./elastic_pt
# elastic_pt/dashboards links to these.
COPY dashboards ./dashboards
RUN /opt/venv/bin/pip install --constraint constraints.txt setuptools \
    && /opt/venv/bin/pip install --constraint constraints.txt --no-build-isolation ".${EXTRAS}"

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="elastic-pt" \
      org.opencontainers.image.description="One node of an elastic, bit-exact pre-training run" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 elastic-pt \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin elastic-pt
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 9400
# tini hands signals to the agent only (no -g): the agent decides what happens to its workers.
ENTRYPOINT ["/usr/bin/tini", "--", "elastic-pt"]
CMD ["--help"]
