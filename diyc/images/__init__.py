"""Root filesystems: where they come from, how an archive is unpacked safely, and the `host` image.

tarstream.py reads an archive into entries, archive.py writes entries below one directory and nowhere else,
store.py keeps each archive unpacked once, host.py builds the small skeleton that goes over the host's /usr."""

from __future__ import annotations
