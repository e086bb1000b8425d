"""The kernel command line: what it may hold, and how long it may be."""

from pileus.arch.x86_64.layout import CMDLINE_MAX
from pileus.errors import ConfigError

OPTION = "--cmdline"
SHOWN = 40  # characters of a refused command line that its error repeats


def encode(text: str, kernel_max: int | None = None) -> bytes:
    """``text`` as the kernel reads it, with its NUL.

    ``kernel_max`` is the length this kernel keeps; it would drop the rest without a word, so a longer
    line raises ConfigError, as do characters other than printable ASCII.
    """
    if not (text.isascii() and text.isprintable()):
        raise ConfigError(OPTION, _shown(text), "only printable ASCII characters are allowed")
    allowed = CMDLINE_MAX - 1 if kernel_max is None else min(kernel_max, CMDLINE_MAX - 1)
    if len(text) > allowed:
        raise ConfigError(
            OPTION, _shown(text), f"has {len(text)} characters, this kernel takes at most {allowed}"
        )
    return text.encode("ascii") + b"\0"


def _shown(text: str) -> str:
    return ascii(text if len(text) <= SHOWN else text[:SHOWN] + "...")
