"""Where things are when nobody said so."""

import os


def default_api_socket() -> str:
    """The API's socket, in the run-time directory of the user behind this process (also behind sudo)."""
    user = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else str(os.geteuid())
    folder = f"/run/user/{user}" if user.isdecimal() else "/run"
    return f"{folder}/pileus.{os.getpid()}"
