"""Writing a file whole or not at all."""

import os
from pathlib import Path


def write(path, content):
    """Replaces the file with `content` (str as UTF-8, or bytes): readers see the old file or the new one, also after a
    power cut. A symbolic link stays: the file that it points to is replaced. Raises OSError, and then the old file is
    untouched."""
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode("utf-8") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
