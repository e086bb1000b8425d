"""Extended attributes: the user's, and capabilities of programs. Others mean something to this host only.

Source: xattr(7)
"""

import errno
import os

PREFIXES = (b"user.", b"security.capability")


def get(path: str, name: bytes) -> bytes:
    """Raises OSError, as all of these."""
    return os.getxattr(path, _checked(name))


def put(path: str, name: bytes, value: bytes, flags: int) -> None:
    os.setxattr(path, _checked(name), value, flags & (os.XATTR_CREATE | os.XATTR_REPLACE))


def remove(path: str, name: bytes) -> None:
    os.removexattr(path, _checked(name))


def names(path: str) -> bytes:
    """Those there are, each with a NUL."""
    there = map(os.fsencode, os.listxattr(path))
    return b"".join(name + b"\0" for name in there if name.startswith(PREFIXES))


def _checked(name: bytes) -> bytes:
    if not name.startswith(PREFIXES):
        raise OSError(errno.EOPNOTSUPP, "an attribute of this host only")
    return name
