"""A guest program of some 300 bytes that writes to I/O port 0x80.

Debian's cloud kernels have no /dev/port, so no shell command can do it. As process 1 (it is /init) it
writes 0x60, "user space reached", and becomes the shell that runs /etc/rc; as ``debug-port CODE`` it
writes CODE. Where the port is out of reach (iopl refused, or a processor that faults all the same, as
QEMU's TCG does for a busy TSS), it goes on without.
"""

import re
import struct

BASE = 0x400000
HEADERS = 64 + 56
CODE = """
    4889e3                      # rbx = rsp, to find the arguments again after a signal
    b80d000000 bf0b000000       # rt_sigaction(SIGSEGV,
    be{action}                  #     action: go on at "written",
    31d2 41ba08000000 0f05      #     NULL, 8)
    b8ac000000 bf03000000 0f05  # iopl(3)
    85c0 75:written
    b827000000 0f05             # getpid()
    83f801 75:argument
    b060 eb:write               # process 1: al = 0x60
argument:
    488b742410 4885f6 74:written  # rsi = argv[1]
    31c0
digit:
    0fb60e 84c9 74:write        # while (cl = *rsi)
    6bc00a 8d4408d0 48ffc6      #     eax = eax * 10 + cl - '0', rsi++
    eb:digit
write:
    e680                        # out 0x80, al
written:
    4889dc                      # rsp = rbx
    b827000000 0f05             # getpid()
    83f801 75:leave
    488b0424 488d54c410         # rdx = envp, behind argc arguments and a null
    bf{path} be{arguments}      # execve("/bin/busybox", ["sh", "/etc/rc"], envp)
    b83b000000 0f05
leave:
    31ff b83c000000 0f05        # exit(0)
"""
SA_NODEFER_RESTORER = 0x40000000 | 0x04000000  # the kernel delivers nothing without the second


def program() -> bytes:
    """Return the ELF file."""
    size = len(_assemble({"action": 0, "path": 0, "arguments": 0})[0])
    strings = BASE + HEADERS + size
    text = b"/bin/busybox\0sh\0/etc/rc\0"
    tables = strings + len(text) + 7 & ~7
    code, labels = _assemble({"action": tables + 24, "path": strings, "arguments": tables})
    written = BASE + HEADERS + labels["written"]
    data = text.ljust(tables - strings, b"\0")
    data += struct.pack("<3Q", strings + 13, strings + 16, 0)
    data += struct.pack("<4Q", written, SA_NODEFER_RESTORER, written, 0)
    total = HEADERS + len(code) + len(data)
    ident = b"\x7fELF\x02\x01\x01"
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, BASE + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, total, total, 0x1000)
    return elf + segment + code + data


def _assemble(values: dict[str, int]) -> tuple[bytes, dict[str, int]]:
    """Return the code and the offsets of its labels: {name} is 32 bits, ``75:label`` a short jump."""
    words = re.sub(r"#.*", "", CODE).split()
    code, labels, jumps = bytearray(), {}, []
    for word in words:
        if word.endswith(":"):
            labels[word[:-1]] = len(code)
        elif ":" in word:
            opcode, _, label = word.partition(":")
            code += bytes.fromhex(opcode) + b"\0"
            jumps.append((len(code), label))
        elif "{" in word:
            opcode, _, name = word.rstrip("}").partition("{")
            code += bytes.fromhex(opcode) + struct.pack("<I", values[name])
        else:
            code += bytes.fromhex(word)
    for end, label in jumps:
        struct.pack_into("<b", code, end - 1, labels[label] - end)
    return bytes(code), labels
