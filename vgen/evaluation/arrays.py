"""One array of an .npz, read row by row: neither loaded whole nor unpickled."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vgen.types import SettingError

DAMAGED = (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError, tokenize.TokenError)


class ArrayMissing(SettingError):
    """An .npz without the array that was asked for."""


class ArrayMember:
    """One array of an .npz, read by rows without loading the rest. Raises SettingError where it is not there."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            with zipfile.ZipFile(path) as archive:
                names = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
                if name not in names:
                    held = ", ".join(names[:8]) or "no arrays"
                    raise ArrayMissing(f"{path} has no array {name}: it holds {held}")
                self.file = archive.open(f"{name}.npy")  # keeps the archive's file open
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, self.dtype = read(self.file)
        except DAMAGED as error:
            raise SettingError(f"{path} is damaged or no .npz ({error}): get it again") from error
        except ValueError as error:
            if isinstance(error, SettingError):
                raise
            raise SettingError(f"{name} of {path} is no plain array ({error})") from error
        if fortran or self.dtype.hasobject:
            raise SettingError(f"{name} of {path} is not a C-ordered array of numbers")
        self.begin = self.file.tell()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop."""
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        try:
            self.file.seek(self.begin + start * row)
            content = self.file.read((stop - start) * row)
        except (*DAMAGED, ValueError) as error:
            raise SettingError(f"{self.path} is damaged or truncated ({error}): get it again") from error
        if len(content) != (stop - start) * row:
            raise SettingError(f"{self.path} is truncated: {self.name} ends before row {stop} of {self.shape[0]}")
        return np.frombuffer(bytearray(content), self.dtype).reshape(stop - start, *self.shape[1:])

    def read_scalar(self) -> Any:
        """The value of an array without axes; None for any other."""
        if self.shape:
            return None
        try:
            content = self.file.read()  # to the end, where the checksum is compared
            return np.frombuffer(content, self.dtype)[0]
        except (*DAMAGED, ValueError, IndexError) as error:
            raise SettingError(f"{self.path} is damaged or truncated ({error}): get it again") from error
