"""The guest's initramfs: Debian's busybox, a few shell scripts, and modules of one kernel.

It is left uncompressed: the guest then only copies it, which in software KVM beats decompression.
The same input gives the same bytes.
"""

import lzma
import struct
import subprocess
import tempfile
from pathlib import Path

from support.host import ScriptError, run

BUSYBOX = Path("/bin/busybox")
GUEST = Path(__file__).parent / "guest"
MODULES = ["pvpanic", "pvpanic-mmio", "pvpanic-pci"]  # those a kernel has; 5.10 keeps all in pvpanic
APPLETS = """[ awk basename cat chmod chvt cp cttyhack cut date dd df dirname dmesg echo env expr false find free
grep halt head hexdump hostname id ifconfig insmod ip kill less ln ls lsmod md5sum mkdir mknod modprobe more
mount mv nproc od ping poweroff printf ps pwd readlink reboot rm rmmod sed seq setsid sh sha256sum sleep sort
stat stty sync tail test time top touch tr true umount uname uptime vi wc which xargs yes""".split()


def build(modules: Path, release: str) -> bytes:
    """Return the cpio archive for kernel ``release`` whose modules lie in ``modules``."""
    if not BUSYBOX.exists():
        raise ScriptError("/bin/busybox is missing: run scripts/setup guest")
    archive = Cpio()
    for directory in ("bin", "dev", "etc", "proc", "sys", "tmp", "lib", "lib/modules"):
        archive.directory(directory)
    archive.console("dev/console")
    archive.file("init", program := _debug_port(), 0o755)
    archive.file("bin/debug-port", program, 0o755)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    known = set(subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split())
    for applet in sorted(known.intersection(APPLETS)):
        archive.link(f"bin/{applet}", "busybox")
    archive.file("etc/rc", (GUEST / "rc").read_bytes(), 0o755)
    for script in ("report", "tell"):
        archive.file(f"bin/{script}", (GUEST / script).read_bytes(), 0o755)
    _add_modules(archive, modules, release)
    return archive.finish()


def _add_modules(archive: "Cpio", modules: Path, release: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "lib/modules", release)
        target.mkdir(parents=True)
        for path in sorted(modules.rglob("*.ko*")):
            name, _, packed = path.name.partition(".ko")
            if name.replace("_", "-") in MODULES:
                data = path.read_bytes()
                (target / f"{name}.ko").write_bytes(lzma.decompress(data) if packed == ".xz" else data)
        run(["/sbin/depmod", "--basedir", scratch, release])
        archive.directory(f"lib/modules/{release}")
        for name in [*sorted(path.name for path in target.glob("*.ko")), "modules.dep"]:
            archive.file(f"lib/modules/{release}/{name}", (target / name).read_bytes(), 0o644)


class Cpio:
    """Writes the "newc" format: owner root, time 0, inodes counted up.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        self._add(name, b"", 0o040755)

    def file(self, name: str, data: bytes, mode: int) -> None:
        self._add(name, data, 0o100000 | mode)

    def link(self, name: str, target: str) -> None:
        self._add(name, target.encode(), 0o120777)

    def console(self, name: str) -> None:
        self._add(name, b"", 0o020600, device=(5, 1))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)

    def _add(self, name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        links, size = 1, len(data)
        fields = (self._inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]


def _debug_port() -> bytes:
    """Return the program that is /init, and that also serves as the command ``debug-port CODE``.

    Debian's cloud kernels have no /dev/port, so no shell command can write to an I/O port. As process 1
    it writes 0x60, "user space reached", and becomes the shell that runs /etc/rc.
    """
    base = 0x400000
    headers = 64 + 56
    code = bytes.fromhex(
        "b8ac000000 bf03000000 0f05"  # iopl(3)
        "85c0 7532"  # where it is forbidden, do without
        "b827000000 0f05"  # getpid()
        "83f801 7504 b060 eb1f"  # process 1: al = 0x60
        "488b742410 4885f6 7418 31c0"  # rsi = argv[1]; none: leave
        "0fb60e 84c9 740c"  # while (cl = *rsi) …
        "6bc00a 8d4408d0 48ffc6 ebed"  # … eax = eax * 10 + cl - '0'
        "90 e680"  # out 0x80, al
        "b827000000 0f05 83f801 751a"  # only process 1 goes on
        "488b0424 488d54c410"  # rdx = envp, behind argc arguments and a null
    )
    tail_size = 5 + 5 + 5 + 2 + 2 + 5 + 2
    strings = base + headers + len(code) + tail_size
    path, shell, script = strings, strings + 13, strings + 16
    argv = (strings + 24 + 7) & ~7
    code += b"\xbf" + struct.pack("<I", path) + b"\xbe" + struct.pack("<I", argv)
    code += bytes.fromhex("b83b000000 0f05")  # execve("/bin/busybox", ["sh", "/etc/rc"], envp)
    code += bytes.fromhex("31ff b83c000000 0f05")  # exit(0)
    data = b"/bin/busybox\0sh\0/etc/rc\0".ljust(argv - strings, b"\0")
    data += struct.pack("<3Q", shell, script, 0)
    size = headers + len(code) + len(data)
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return elf + segment + code + data
