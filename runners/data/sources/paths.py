"""A data folder that confines the paths in its records."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from runners.data.types import BadRecordError
from runners.shell.errors import UserError


class DataFolder:
    """Resolves the relative paths that records give. Raises UserError unless it is a folder."""

    def __init__(self, root: str | Path) -> None:
        if not os.path.isdir(root):
            raise UserError(f"The image folder {root} does not exist: give the folder of pictures.")
        self.root = os.path.realpath(root)
        self._resolved: dict[str, str] = {}  # of folders, since following links costs system calls

    def file(self, name: str) -> Path:
        """The regular file `name` below the folder.

        Raises BadRecordError for absolute paths, for `..`, for links that lead outside, and where
        there is no such file.
        """
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            why = f"the picture path {name!r} has half a character (a lone surrogate)"
            raise BadRecordError("picture missing", why) from error
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        if posix.is_absolute() or windows.anchor or ".." in windows.parts or "\0" in name:
            raise BadRecordError(
                "picture outside",
                f"the picture path {name!r} leaves the data folder {self.root}: paths must be "
                "relative and without '..'",
            )
        parent = str(posix.parent)
        if parent not in self._resolved:
            self._resolved[parent] = os.path.realpath(os.path.join(self.root, parent))
        path = os.path.join(self._resolved[parent], posix.name)
        self._check_inside(name, path)
        try:
            kind = os.lstat(path).st_mode
            if stat.S_ISLNK(kind):
                path = os.path.realpath(path)
                self._check_inside(name, path)
                kind = os.stat(path).st_mode
        except OSError as error:
            raise BadRecordError("picture missing", f"{path} does not exist") from error
        if not stat.S_ISREG(kind):  # reading a pipe or a device might never end
            raise BadRecordError("picture missing", f"{path} is not a file")
        return Path(path)

    def _check_inside(self, name: str, path: str) -> None:
        if os.path.commonpath([self.root, path]) != self.root:
            raise BadRecordError(
                "picture outside",
                f"the picture path {name!r} leads to {path}, outside the data folder "
                f"{self.root}: copy the picture into it",
            )
