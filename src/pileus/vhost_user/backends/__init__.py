"""The devices that the commands ``pileus-blk`` and ``pileus-net`` serve, made of their options."""
