# One image for every node: the agent and its workers. docs/deployment/image.md describes it.
#
#   docker build -t elastic-pt .                                                the default torch, with its CUDA libraries
#   docker build -t elastic-pt --build-arg PIP_EXTRA_INDEX_URL=URL .            with torch's index of CPU builds: the small image
#   docker build -t elastic-pt --build-arg EXTRAS=gcs .                         with the client of another bucket
#   make image                                                                  the small image, with all labels
#
# It runs with a read-only root file system, as any user. It writes to /tmp (cached token shards, sockets) and to
# /dev/shm (states in memory), so give both enough room; Docker's default /dev/shm of 64 MB is too small.
# There is no HEALTHCHECK: the peers of a node judge whether it lives, and a second judge would kill healthy ones.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# Further packages of the distribution: train.compile needs "g++ python3-dev".
ARG PACKAGES=
# Seconds since 1970, of the commit: the time of every file that the build writes, so that the same input gives the same layers.
ARG SOURCE_DATE_EPOCH=0
# Logs and caches of the package manager have the time of the build in them.
RUN touch /opt/start \
    && apt-get update \
    && apt-get install -y --no-install-recommends tini ${PACKAGES} \
    && groupadd --gid 10001 elastic-pt \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin elastic-pt \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/ldconfig /var/log/* /etc/*- /var/lib/dpkg/*-old \
    && find / -xdev -newer /opt/start -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} + \
    && rm /opt/start \
    && touch --date="@${SOURCE_DATE_EPOCH}" /opt

FROM base AS build
# Where pip looks, besides its default. TORCH: cpu or cuda; empty takes the CPU build where pip finds one.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG TORCH
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 \
    PIP_NO_COMPILE=1
# What is installed up to here is in the image; the build needs more.
RUN cp -a /var/lib/dpkg /opt/dpkg && apt-get update && apt-get install -y --no-install-recommends binutils
RUN python3 -m venv /opt/venv && python3 -m venv /opt/tools
WORKDIR /src
COPY requirements ./requirements
RUN sh requirements/install.sh /opt/venv/bin/python runtime ${EXTRAS} \
    && sh requirements/install.sh /opt/tools/bin/python image
COPY pyproject.toml README.md LICENSE ./
# elastic_pt/dashboards links to these.
COPY dashboards ./dashboards
COPY elastic_pt ./elastic_pt
COPY deploy/image ./deploy/image
ARG SOURCE_DATE_EPOCH=0
RUN ["sh", "deploy/image/install.sh"]

FROM base
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG SOURCE=
LABEL org.opencontainers.image.title="elastic-pt" \
      org.opencontainers.image.description="One node of an elastic, bit-exact pre-training run" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /usr/share/elastic-pt /usr/share/elastic-pt
# A user id without a name, as OpenShift gives, has its name from USER.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    USER=elastic-pt \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 9400
# tini hands signals to the agent only (no -g): the agent decides what happens to its workers.
ENTRYPOINT ["/usr/bin/tini", "--", "elastic-pt"]
CMD ["--help"]
