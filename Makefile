# Every command of the project; people and CI use the same.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

BACKEND ?= vxlan
# What `flanneld version` names.
export FLANNEL_COMMIT ?= $(shell git describe --always --dirty --exclude='*' 2>/dev/null)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Where cargo puts programs: .cargo/config.toml names a target, so there is a directory per target.
PROGRAMS = $(or $(CARGO_TARGET_DIR),target)/$(shell rustc -vV | sed -n 's/^host: //p')/debug
PACKAGES := gcc libc6-dev protobuf-compiler libprotobuf-dev containernetworking-plugins etcd-server etcd-client \
	iproute2 iputils-ping iperf3 iptables nftables ethtool openssl util-linux procps strace prometheus tcpdump \
	wireguard-tools wireguard-go bird2 frr mandoc zsh fish

help: ## Lists the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

deps: ## Installs what building and testing need on Debian, if it is missing
	@missing=; for package in $(PACKAGES); do \
		status=$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null || true); \
		[ "$$status" = installed ] || missing+=" $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q; \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

build: ## Builds all programs for development
	cargo build --workspace --all-features

demo: deps ## Three nodes, real pods, traffic, damage and repair (BACKEND=vxlan, host-gw, wireguard, udp; KEEP=1 to play; root)
	cargo build --locked --profile demo -p bench -p flanneld -p cni-plugin --bin demo --bin flanneld --bin flannel
	$(SUDO) $(PROGRAMS:debug=demo)/demo --backend $(BACKEND) $(if $(KEEP),--keep)

bench: release ## Measures bare, host-gw, vxlan, udp (and FLANNELD_GO's udp) side by side (root; ARGS="--only tcp1 --paths vxlan,udp,wireguard,wireguard-go")
	cargo build --locked --release -p bench --bin bench
	$(SUDO) $(if $(FLANNELD_GO),env FLANNELD_GO=$(FLANNELD_GO)) $(PROGRAMS:debug=release)/bench net $(ARGS)

bench-quick: ## The same, but less of it, within two minutes after the build
	@$(MAKE) bench ARGS="--quick $(ARGS)"

bench-micro: ## Measures what is pure: from leases to changes, for several sizes of cluster
	cargo bench --locked -p bench --bench pure -- $(ARGS)

bench-control: release ## Measures start, repair, restart and size of what is shipped (root; ARGS="--only heal")
	cargo build --locked -p bench --bin bench
	$(SUDO) $(PROGRAMS)/bench control $(ARGS)

bench-cni: release ## Measures the plugin beside Go's plugins: many pods at once, one after the other (root; ARGS="--only one")
	cargo build --locked -p bench --bin bench
	$(SUDO) $(PROGRAMS)/bench cni $(ARGS)

bench-rules: ## Measures traffic rules: repair, restarts, programs run, very many of them (root; ARGS="--only rules-heal")
	cargo build --locked --release -p flanneld
	cargo build --locked --release -p bench --bin bench
	$(SUDO) $(PROGRAMS:debug=release)/bench rules $(ARGS)

bench-kube: ## Measures starts among 2 to 20,000 nodes of Kubernetes, heartbeats, pods that wait (root; ARGS="--only start-5000")
	cargo build --locked --release -p flanneld
	deploy/package/plugin build $(HOST)
	cargo build --locked --release -p bench --bin bench
	$(SUDO) $(PROGRAMS:debug=release)/bench kube $(ARGS)

bench-live: ## Measures changes without a restart: backend, IPv6 added, MTU, addresses, one family (root; ARGS="--only mtu")
	cargo build --locked --release -p flanneld
	cargo build --locked -p bench --bin bench
	$(SUDO) $(PROGRAMS)/bench live $(ARGS)

bench-policy: ## Measures network policies: from nothing, one pod's arrival, nothing changed, memory (root; ARGS="--rounds 9")
	cargo build --locked --release -p bench --bin bench
	$(SUDO) $(PROGRAMS:debug=release)/bench policy $(ARGS)

fuzz-policy: ## Compares a million random packets through compiled policies with the evaluator (ARGS="--seed N")
	cargo build --locked --release -p bench --bin fuzz
	$(PROGRAMS:debug=release)/fuzz --policies --cases 1667 $(ARGS)

fuzz: ## Compares the udp datapath, WireGuard and policies with slow models over random packets (ARGS="--seconds 600", --seed N --cases 1)
	cargo run -p bench --bin fuzz -- $(ARGS)

test: root deps build ## Runs all tests (root)
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} cargo test --workspace --all-features

plugin-check: root deps ## Lints and tests the plugin as it is shipped, with musl (root; ARGS=FILTER for a part of its tests)
	cargo clippy -p cni-plugin --target=$$(deploy/package/plugin target $(HOST)) -- -D warnings
	deploy/package/plugin build $(HOST)
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} TEST_PLUGIN=$$(realpath $(PROGRAMS:debug=release)/flannel) \
		cargo test --workspace --all-features --test plugin -- $(ARGS)

GUEST_TESTS = $$(cargo test --workspace --all-features --test vm --no-run 2>&1 | tee /dev/stderr | \
	sed -n 's/.*Executable.*(\(.*\))$$/\1/p')
# Emulated, an agent that is not optimized takes half of the time of a test.
GUEST_FLANNELD = $$(realpath $(PROGRAMS:debug=release)/flanneld)
test-vm: PACKAGES += qemu-system-x86 busybox-static cpio kmod ipvsadm
test-vm: deps ## Runs the agent that is shipped on Debian's kernel under emulation: without a module, an older one, a lossy network (root)
	cargo build --locked --release -p flanneld
	program=$(GUEST_TESTS); TEST_FLANNELD=$(GUEST_FLANNELD) bench/vm/test "$$program"

test-fast-path: PACKAGES += qemu-system-x86 busybox-static cpio kmod
test-fast-path: deps ## Compares 1 GiB each way by the fast path: through a Service, directly, masqueraded (in a guest; root)
	cargo build --locked --release -p flanneld
	program=$(GUEST_TESTS); \
	TEST_FLANNELD=$(GUEST_FLANNELD) TEST_FAST_PATH_MIB=$${TEST_FAST_PATH_MIB:-1024} bench/vm/boot --one-processor --limit 10800 \
		--modules "veth bridge tun br_netfilter nf_tables vxlan" -- "$$(realpath "$$program")" --test-threads=1 many_bytes_

bench-vm: PACKAGES += qemu-system-x86 busybox-static cpio kmod python3
bench-vm: deps ## Measures pods' traffic with and without the fast path in instructions, in a guest (ARGS="--backends vxlan"; root)
	cargo build --locked --release -p flanneld
	cargo build --locked --release -p bench --bin guest
	bench/vm/bench $(PROGRAMS:debug=release)/guest $(ARGS)

test-peers: root deps ## Compares 1 GiB each way between WireGuard in process and wireguard-go (root; WIREGUARD_PEER=boringtun-cli)
	WIREGUARD_BYTES=$$((1 << 30)) cargo test --workspace --all-features --test udp wireguard_go_is_reached

root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS) needs root: tests make network namespaces" >&2; exit 1; }

# Programs of Kubernetes 1.20 from Debian's source package, the only ones that come without a download from elsewhere.
KUBERNETES = $(or $(CARGO_TARGET_DIR),target)/kubernetes
test-kube: PACKAGES += golang-go dpkg-dev rsync
test-kube: root deps ## Runs the Kubernetes suite over a real API server (built once, or of KUBEBUILDER_ASSETS=DIR)
	@if [ -z "$${KUBEBUILDER_ASSETS:-}" ]; then \
		bench/kubernetes/build $(KUBERNETES) kube-apiserver && ln -sf "$$(command -v etcd)" $(KUBERNETES)/etcd; \
	elif [ ! -x "$$KUBEBUILDER_ASSETS/kube-apiserver" ]; then \
		echo "KUBEBUILDER_ASSETS=$$KUBEBUILDER_ASSETS: there is no kube-apiserver in it" >&2; exit 1; \
	fi
	KUBEBUILDER_ASSETS=$${KUBEBUILDER_ASSETS:-$$(realpath $(KUBERNETES))} \
		cargo test --workspace --all-features --test kube-real

test-cluster: PACKAGES += golang-go dpkg-dev rsync busybox-static containerd runc openssl python3 curl
test-cluster: root image ## Runs kube-flannel.yml on a real Kubernetes of two nodes (ARGS="network policies"; KEEP=1 to play; root)
	bench/kubernetes/build $(KUBERNETES) kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl
	bench/kubernetes/check $(KUBERNETES) $(OUTPUT)image/flannel-rs.tar $(ARGS)

fmt: ## Formats the code
	cargo fmt --all

clippy: ## Lints; a warning is an error
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	cargo clippy -p subnet --test kube-real --all-features -- -D warnings
	cargo clippy -p flanneld --test vm --all-features -- -D warnings

doc: ## Builds the documentation; a warning is an error
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features

# $(call without,PACKAGE,CRATES): PACKAGE has none of CRATES among its dependencies, or with
# $(call without,PACKAGE,CRATES,--depth=1) not among its direct ones.
without = tree=$$(cargo tree --locked -q -p $(1) -e normal,build --all-features --prefix=none $(3) | cut -d' ' -f1); \
	for crate in $(2); do \
		! grep -qx $$crate <<<"$$tree" || { echo "$(1) must not depend on $$crate" >&2; exit 1; }; \
	done

layers: PACKAGES += python3
layers: deps ## Checks who depends on whom (crates, files without cycles, layers inside of backends), sizes, and that no two types of a crate share a name
	@$(call without,subnet,rtnetlink netlink-sys clap)
	@$(call without,backends,kube k8s-openapi etcd-client clap)
	@$(call without,cni-plugin,tokio kube k8s-openapi etcd-client rtnetlink netlink-sys clap)
	@$(call without,flanneld,etcd-client kube-client rtnetlink netlink-sys netlink-packet-route,--depth=1)
	@$(call without,bench,kube etcd-client rtnetlink netlink-sys netlink-packet-route,--depth=1)
	@for package in flanneld bench; do $(call without,$$package,aws-lc-rs aws-lc-sys openssl-sys); done
	@.ci/module-cycles
	@.ci/sizes
	@.ci/same-names

release: ## Builds the static programs that are shipped: flanneld, and the plugin with musl where Rust has it
	cargo build --locked --release $(if $(PLATFORM),--target=$(TRIPLE)) -p flanneld
	deploy/package/plugin build $(TRIPLE)

VERSION := v$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# With a registry: the kubelet would look for a name without one at docker.io.
IMAGE ?= localhost/flannel-rs:$(VERSION)
BUILDER ?= buildah
image: PACKAGES += $(filter-out docker,$(BUILDER))
# Another platform needs Rust's target and a linker for it (rustup target add, gcc-aarch64-linux-gnu, and
# CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER); Docker's builder compiles for it by the Dockerfile instead.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
TRIPLES := linux/amd64=x86_64-unknown-linux-gnu linux/arm64=aarch64-unknown-linux-gnu linux/arm/v7=armv7-unknown-linux-gnueabihf \
	linux/ppc64le=powerpc64le-unknown-linux-gnu linux/s390x=s390x-unknown-linux-gnu linux/riscv64=riscv64gc-unknown-linux-gnu
# Without PLATFORM this machine's.
TRIPLE = $(if $(PLATFORM),$(or $(patsubst $(PLATFORM)=%,%,$(filter $(PLATFORM)=%,$(TRIPLES))),$(error PLATFORM=$(PLATFORM): $(TRIPLES))),$(HOST))
OUTPUT = $(or $(CARGO_TARGET_DIR),target)/
image: deps release ## Builds the image target/image/flannel-rs.tar (IMAGE=NAME:TAG; PLATFORM=linux/arm64; BUILDER=podman or docker)
	$(SUDO) env BUILDER=$(BUILDER) PLATFORM=$(PLATFORM) REVISION=$(FLANNEL_COMMIT) \
		deploy/image/build $(OUTPUT)$(TRIPLE)/release $(IMAGE) $(OUTPUT)image
	deploy/package/sbom $(TRIPLE) >$(OUTPUT)image/flannel-rs.cdx.json

PREFIX ?= /usr/local
CNI_BIN ?= /opt/cni/bin
install: ## Installs the programs that make release built, with unit, manual pages, completions (PREFIX=, CNI_BIN=, DESTDIR=)
	@[ -x $(PROGRAMS:debug=release)/flanneld ] || { echo "make install needs the programs: run make release first" >&2; exit 1; }
	PREFIX=$(PREFIX) CNI_BIN=$(CNI_BIN) DESTDIR=$(DESTDIR) deploy/package/install $(PROGRAMS:debug=release)

dist: PACKAGES += python3
dist: deps release ## Makes target/dist: an archive of the static programs, its bill of materials, SHA256SUMS
	deploy/package/dist $(PROGRAMS:debug=release) $(OUTPUT)dist $(VERSION)
	deploy/package/check-dist $(OUTPUT)dist

sbom-check: PACKAGES += python3
sbom-check: deps ## Checks the bill of materials of the shipped programs
	@mkdir -p $(OUTPUT)
	deploy/package/sbom $(TRIPLE) >$(OUTPUT)sbom-check.json
	deploy/package/check-sbom $(OUTPUT)sbom-check.json

CARGO_DEB := 3.8.0
TOOLS = $(OUTPUT)tools
deb: PACKAGES += python3 lintian
deb: deps release ## Builds the Debian package in target/deb, and checks it with lintian
	@if [ "$$($(TOOLS)/bin/cargo-deb --version 2>/dev/null)" != "cargo-deb $(CARGO_DEB)" ]; then \
		tools=$$(realpath -m $(TOOLS)); \
		cd / && CARGO_TARGET_DIR=$$tools/build cargo install -q --locked --root $$tools --no-default-features cargo-deb@$(CARGO_DEB); \
	fi
	CARGO_DEB=$$(realpath $(TOOLS)/bin/cargo-deb) deploy/package/deb $(PROGRAMS:debug=release) $(OUTPUT)deb

deb-check: PACKAGES += python3 mmdebstrap systemd
deb-check: deb ## Installs, runs, upgrades, removes and purges the package in a root of its own (root)
	$(SUDO) deploy/package/check-deb $(OUTPUT)deb/flannel-rs_*.deb $(OUTPUT)deb
	$(SUDO) deploy/package/check-unit $(OUTPUT)deb/flannel-rs_*.deb $(OUTPUT)deb

# Schemas of all versions of Kubernetes (the newest is the default), and Helm as a library.
CHECKERS := kubernetes-validate==1.37.0 helm-python-sdk==0.2.2
CHECKS := $(or $(CARGO_TARGET_DIR),target)/manifest-check
KUBECTL ?= kubectl
POLICIES := deploy/kustomize/overlays/network-policy/kube-flannel-network-policy.yml
# Debian's kubectl, unless there is another one, whose package may own the same file.
manifest-check: PACKAGES += python3-venv $(if $(shell command -v $(KUBECTL)),,kubernetes-client)
manifest-check: deps ## Checks the manifest, kustomize overlays and the Helm chart against the schemas of Kubernetes, without a cluster
	@if [ "$$(cat $(CHECKS)/done 2>/dev/null)" != "$(CHECKERS)" ]; then \
		rm -rf $(CHECKS); \
		/usr/bin/python3 -m venv $(CHECKS); \
		$(CHECKS)/bin/pip -q --disable-pip-version-check install $(CHECKERS); \
		echo "$(CHECKERS)" >$(CHECKS)/done; \
	fi
	$(CHECKS)/bin/python deploy/check-manifest kube-flannel.yml localhost/flannel-rs:$(VERSION) $(POLICIES)
	KUBECTL=$(KUBECTL) $(CHECKS)/bin/python deploy/check-renderings kube-flannel.yml $(VERSION) $(CHECKS)/renderings
	$(CHECKS)/bin/kubernetes-validate --quiet --strict kube-flannel.yml $(POLICIES) $(CHECKS)/renderings/*.yaml

monitoring-check: PACKAGES += python3
monitoring-check: deps ## Tests the alert rules of docs/monitoring with promtool, and that the dashboard is JSON
	promtool check rules docs/monitoring/alerts.yml
	cd docs/monitoring && promtool test rules alerts_test.yml
	python3 -c 'import json; json.load(open("docs/monitoring/grafana.json"))'

report-check: PACKAGES += python3 chromium-headless-shell fonts-dejavu-core
report-check: deps build ## Looks at pages of flanneld report in a browser; pictures go to target/report-check
	.ci/check-report $(PROGRAMS)/flanneld $(or $(CARGO_TARGET_DIR),target)/report-check

docs-check: PACKAGES += python3
docs-check: deps ## Checks that references and links between documents lead somewhere, and docs/reference.md against the program
	.ci/check-docs
	cargo test -q --workspace --all-features --bin flanneld document::

makefile-check: ## Tests this file: what `make deps` finds missing, what `make test` refuses (root)
	.ci/test-makefile

ci: deps ## Everything that must hold before a change is merged
	cargo fmt --all -- --check
	@# One make for each: one for all of them would make `deps` once, and so install what the first of them needs.
	for target in makefile-check docs-check monitoring-check manifest-check sbom-check clippy doc layers report-check test plugin-check test-vm; do \
		$(MAKE) $$target VM=quick; \
	done

.PHONY: install dist deb deb-check bench-policy fuzz-policy help root deps build demo bench bench-quick bench-micro bench-control bench-cni bench-rules bench-kube bench-live bench-vm fuzz test test-vm test-fast-path test-peers test-kube test-cluster fmt clippy doc layers release image manifest-check monitoring-check report-check docs-check makefile-check sbom-check ci
