# The image for builders of several architectures:
#
#     docker buildx build --platform=linux/amd64,linux/arm64 --build-arg=VERSION=v0.1.0 --build-arg=REVISION=COMMIT \
#         --tag=NAME --sbom=true --push .
#
# `make image` builds it without such a builder, from the last stage of this file and programs of this machine.
# The stages before it compile for the platform that is asked for. They have not been run: where this project
# is tested there is no Docker engine, and no image to begin with.

ARG RUST=1.95-bookworm
FROM rust:${RUST} AS programs
RUN apt-get update -q \
    && apt-get install -q -y --no-install-recommends protobuf-compiler libprotobuf-dev \
    && rm -r /var/lib/apt/lists
WORKDIR /src
COPY . .
RUN host=$(rustc -vV | sed -n 's/^host: //p') \
    && cargo build --locked --release -p flanneld \
    && deploy/package/plugin build "$host" \
    && deploy/image/tree "target/$host/release" /tree

FROM scratch AS tree
COPY --from=programs /tree/ /

FROM scratch
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="flannel-rs" \
      org.opencontainers.image.description="flanneld and the CNI plugin flannel" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=tree / /
ENV PATH=/opt/bin:/bin
# Capabilities that a pod adds are given to root alone, and the directories of the node belong to root.
USER 0:0
ENTRYPOINT ["/opt/bin/flanneld"]
