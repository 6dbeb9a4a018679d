"""Which errors are a user's mistakes, and what is said about them: one line."""

import errno
import os

_FILE_TROUBLE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EROFS: "read-only"}


def describe(error: BaseException) -> str | None:
    """One line about a mistake that the user can mend; None for a fault of the program, and when BRAID_DEBUG is set.

    Mistakes are ValueErrors, missing or unusable files, and a full disk.
    """
    if os.environ.get("BRAID_DEBUG", "") not in ("", "0"):
        return None
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _NO_ROOM:
            return f"{where}{_NO_ROOM[error.errno]}"
        return f"{where}{(error.strerror or str(error)).lower()}" if isinstance(error, _FILE_TROUBLE) else None
    return " ".join(str(error).split()) if isinstance(error, ValueError) else None
