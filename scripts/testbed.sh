#!/usr/bin/env bash
# Builds the images, runs docker-compose.yml once, and always removes its containers. Exit status: the coordinator's; 69 if
# this machine has no engine, BuildKit, compose or base image, with one line that says which.
#
# A build gets the pip configuration and the CA bundle of this machine, if there are any: PIP_CONF, CA_BUNDLE.
set -euo pipefail
cd "$(dirname "$0")/.."
PIP_CONF=${PIP_CONF-/etc/pip.conf}
CA_BUNDLE=${CA_BUNDLE-/etc/ssl/certs/ca-certificates.crt}
BASE=python:3.11-slim-bookworm
TAG=0.1.0
LIMIT_S=${LIMIT_S:-300}

left_out() {
  echo "testbed: left out: $1"
  exit 69
}

# The first client that has BuildKit: within it before 23, as its plug-in buildx from then on.
client_with_buildkit() {
  local client
  while read -r client; do
    if "$client" buildx version >/dev/null 2>&1 || (($("$client" --version | grep -oE '[0-9]+' | head -n 1) < 23)); then
      echo "$client"
      return
    fi
  done < <(type -ap docker)
  return 1
}

docker info >/dev/null 2>&1 || left_out "no Docker engine answers here"
docker=$(client_with_buildkit) || left_out "docker has no BuildKit; install its plug-in buildx"
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose --project-name shoal-testbed)
elif docker-compose version >/dev/null 2>&1; then
  compose=(docker-compose --project-name shoal-testbed)
else
  left_out "neither 'docker compose' nor docker-compose is here"
fi
docker image inspect "$BASE" >/dev/null 2>&1 || docker pull --quiet "$BASE" >/dev/null 2>&1 ||
  left_out "the image $BASE is not here and cannot be pulled"

# What this machine's package registry needs, see the Dockerfile.
own=()
if [ -f "$PIP_CONF" ]; then
  # A registry that needs settings is most likely reached from this machine's network alone.
  own+=(--network host --secret "id=pip_conf,src=$PIP_CONF")
  [ ! -f "$CA_BUNDLE" ] || own+=(--secret "id=ca_bundle,src=$CA_BUNDLE")
fi
for target in node seaweedfs coordinator; do
  echo "testbed: building shoal-$target:$TAG"
  image=(--target "$target" --tag "shoal-$target:$TAG")
  if ! log=$(DOCKER_BUILDKIT=1 "$docker" build --quiet "${own[@]}" "${image[@]}" . 2>&1); then
    tail -n 40 <<<"$log"
    exit 1
  fi
done

running=
down() {
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
  "${compose[@]}" down --volumes --remove-orphans --timeout 5 </dev/null >/dev/null 2>&1 || true
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
down
# In the background, since bash would put off a signal until its foreground command ends.
timeout "$LIMIT_S" "${compose[@]}" up --no-build --no-color --exit-code-from coordinator </dev/null &
running=$!
wait "$running" && status=0 || status=$?
running=
[ "$status" -ne 124 ] || echo "testbed: WRONG: not done after $LIMIT_S s"
exit "$status"
