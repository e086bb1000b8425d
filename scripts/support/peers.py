"""Programs of Debian 13 that tests talk to: .cache/peers/bin has a script that starts each."""

from support import foreign

# What dpdk-testpmd is linked with, and two drivers: the 200 packages it depends on are too many.
DPDK = [
    "bitratestats25", "bpf25", "bus-auxiliary25", "bus-dpaa25", "bus-pci25", "bus-vdev25",
    "cmdline25", "common-dpaax25", "common-iavf25", "common-mlx5-25", "crypto-scheduler25",
    "cryptodev25", "dmadev25", "eal25", "ethdev25", "eventdev25", "gro25", "gso25", "hash25",
    "ip-frag25", "kvargs25", "latencystats25", "log25", "mbuf25", "mempool-dpaa25",
    "mempool-ring25", "mempool25", "meter25", "metrics25", "net-bnxt25", "net-bond25", "net-dpaa25",
    "net-i40e25", "net-iavf25", "net-ice25", "net-ixgbe25", "net-mlx5-25", "net-tap25", "net-vhost25",
    "net-virtio25", "net25", "pcapng25", "pci25", "pdump25", "rcu25",
    "reorder25", "ring25", "sched25", "security25",
    "telemetry25", "timer25", "vhost25",
]  # fmt: skip
PACKAGES = [
    "virtiofsd", "passt", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2",
    "dpdk-dev", *(f"librte-{name}" for name in DPDK),
    "ibverbs-providers", "libbsd0", "libcap2", "libdbus-1-3", "libelf1t64", "libfdt1", "libibverbs1",
    "libjansson4", "libmd0", "libnl-3-200", "libnl-route-3-200", "libnuma1", "libpcap0.8t64", "libsystemd0",
    "libzstd1", "zlib1g",
    "libblkio1", "qemu-utils", "qemu-block-extra",  # QEMU as a front-end; tests call libblkio, too
    "libaio1t64", "liburing2", "libnettle8t64", "libgmp10", "libhogweed6t64", "libglib2.0-0t64",
    "libgnutls30t64", "libpcre2-8-0", "libp11-kit0", "libidn2-0", "libunistring5", "libtasn1-6", "libffi8",
]  # fmt: skip
PROGRAMS = {
    "qemu-img": "usr/bin/qemu-img",
    "qemu-io": "usr/bin/qemu-io",
    "virtiofsd": "usr/libexec/virtiofsd",
    "passt": "usr/bin/passt",
    "dpdk-testpmd": "usr/bin/dpdk-testpmd",
}
_UNPACKED = foreign.Unpacked("peers", {"trixie": PACKAGES}, PROGRAMS)
PEERS = _UNPACKED.folder


def fetch() -> None:
    """Have all programs in .cache/peers; what is there is kept."""
    _UNPACKED.fetch(variables={"QEMU_MODULE_DIR": f"{PEERS / foreign.LIBRARIES}/qemu"})
