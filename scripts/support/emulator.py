"""The QEMU that emulates a machine with KVM for ``scripts/nested``: a newer one than Debian 12 has.

Version 10 changes the mask of a processor's pending interrupts from several threads without care; under
load the emulated kernel hung or died of that every second quarter of an hour. Version 11 does not, and
is faster.
"""

from pathlib import Path

from support import foreign

_UNPACKED = foreign.Unpacked(
    "emulator",
    {
        "trixie-backports": ["qemu-system-x86", "qemu-system-common", "qemu-system-data"],
        "trixie": [
            "seabios", "libaio1t64", "libatomic1", "libblkid1", "libbpf1", "libc6", "libcap2", "libcapstone5",
            "libdaxctl1", "libelf1t64", "libfdt1", "libffi8", "libfuse3-4", "libgcc-s1", "libglib2.0-0t64",
            "libgmp10", "libgnutls30t64", "libhogweed6t64", "libibverbs1", "libidn2-0", "libjpeg62-turbo",
            "libkeyutils1", "libkmod2", "liblzma5", "libmount1", "libndctl6", "libnettle8t64", "libnl-3-200",
            "libnl-route-3-200", "libnuma1", "libp11-kit0", "libpcre2-8-0", "libpixman-1-0", "libpmem1",
            "libpng16-16t64", "librdmacm1t64", "libsasl2-2", "libseccomp2", "libselinux1", "libslirp0",
            "libssl3t64", "libtasn1-6", "libudev1", "libunistring5", "liburing2", "libuuid1",
            "libvdeplug2t64", "libzstd1", "zlib1g",
        ],
    },
    {"qemu-system-x86_64": "usr/bin/qemu-system-x86_64"},
)  # fmt: skip


def fetch() -> Path:
    """Return the command; it is fetched first if it is not there."""
    folder = _UNPACKED.folder
    data = [f"{folder}/usr/share/{name}" for name in ("qemu", "seabios")]
    _UNPACKED.fetch(
        variables={"QEMU_MODULE_DIR": f"{folder / foreign.LIBRARIES}/qemu"},
        options={"qemu-system-x86_64": [word for path in data for word in ("-L", path)]},
    )
    return _UNPACKED.program("qemu-system-x86_64")
