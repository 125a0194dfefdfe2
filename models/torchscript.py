"""Checking of TorchScript archives before PyTorch loads them.

Such a file holds code. PyTorch gets a new archive, made only from checked content: the code as unparsed
by `script_code`, the pickles once `foreign` has interpreted them on inert values, and the tensors that they
refer to. Anything else in the file is left out.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path

from models.archive import DAMAGE, MAX_PICKLE_BYTES, Storages
from models.foreign import Machine
from models.inert import RefusedError, shown
from models.script_code import checked_code
from utils.errors import UserError

MAX_CODE_BYTES = 2 << 20  # of all files together; the largest networks have 0.2 MB
MAX_EXTRA_BYTES = 4 << 20
MAX_ARCHIVE_BYTES = 4 << 30
_CODE = re.compile(r"code/__torch__(/\w+)*\.py")
_CLASS = re.compile(r"__torch__\.(?!torch\.classes\b)[\w.]+")
_LISTS = frozenset(
    f"torch.jit._pickle.{name}"
    for name in (
        "build_intlist",
        "build_doublelist",
        "build_boollist",
        "build_tensorlist",
        "restore_type_tag",
    )
)
TRUST = "export it again, from weights of a source you trust"


def read_torchscript(path: Path) -> tuple[io.BytesIO, dict[str, str]]:
    """Return an archive for torch.jit.load with the checked content, and the file's extra texts by name.

    Nothing is executed. The code in the returned archive can only compute with tensors; its run time and
    memory use are not checked. Raises UserError if the file is not TorchScript or its code does more.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path.stat().st_size).checked()
    except zipfile.BadZipFile as error:
        raise UserError(f"it is not a TorchScript file ({error})", path, "export it again") from error
    except RefusedError as error:
        raise UserError(f"refused: {error}", path, TRUST) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", path, "check the path") from error
    except (*DAMAGE, NotImplementedError, zlib.error) as error:
        raise UserError(
            f"it is not an intact TorchScript file ({str(error)[:300]})", path, "export it again"
        ) from error


class _Archive:
    """The records of a zip written by torch.jit.save."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int) -> None:
        self.archive = archive
        entries = archive.infolist()
        self.records = {info.filename: info for info in entries}
        roots = {name.split("/", 1)[0] for name in self.records}
        if len(roots) != 1 or not any(name.endswith("/constants.pkl") for name in self.records):
            raise ValueError("it holds no TorchScript network")
        if len(self.records) != len(entries):
            raise RefusedError("two of its records have the same name")
        if file_bytes > MAX_ARCHIVE_BYTES:
            raise RefusedError(f"it has more than {MAX_ARCHIVE_BYTES >> 30} GiB")
        self.root = roots.pop() + "/"
        stored = [info for info in entries if info.compress_type == zipfile.ZIP_STORED]
        if sum(info.file_size for info in stored) > file_bytes:
            raise RefusedError("its records are larger than the file")

    def checked(self) -> tuple[io.BytesIO, dict[str, str]]:
        """Return the new archive, and the texts of `extra/` by name."""
        records = {"version": self._read("version", 32), "byteorder": b"little"}
        if f"{self.root}byteorder" in self.records and self._read("byteorder", 32) != b"little":
            raise ValueError("it is in big-endian byte order")
        records |= self._code()
        for name, folder in (("data.pkl", "data"), ("constants.pkl", "constants")):
            records[name] = self._read(name, MAX_PICKLE_BYTES)
            records |= self._tensors(records[name], folder)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as fresh:
            for name, record in records.items():
                fresh.writestr(f"archive/{name}", record)
        content.seek(0)
        return content, self._texts()

    def _code(self) -> dict[str, bytes]:
        left, checked = MAX_CODE_BYTES, {}
        for name in sorted(self.records):
            inside = name.removeprefix(self.root)
            if inside.startswith("code/") and inside.endswith(".py"):
                if not _CODE.fullmatch(inside):
                    raise RefusedError(f"its code {shown(inside)} has an odd name")
                text = self._read(inside, left)
                left -= len(text)
                checked[inside] = checked_code(text.decode("utf-8"), inside).encode()
        return checked

    def _tensors(self, instructions: bytes, folder: str) -> dict[str, bytes]:
        """Return the storages that a pickle refers to; it may name only the archive's own classes."""
        used: dict[str, bytes] = {}

        def read(key: str) -> bytes:
            if not key.isdecimal():
                raise RefusedError(f"a storage is called {shown(key)}")
            info = self.records[f"{self.root}{folder}/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise RefusedError("its tensors are compressed")
            used[f"{folder}/{key}"] = self.archive.read(info)
            return used[f"{folder}/{key}"]

        if b"torch.classes" in instructions:
            raise RefusedError("it names a class that is not its own")
        Machine(Storages(read).get, lambda name: name in _LISTS or bool(_CLASS.fullmatch(name))).run(
            instructions
        )
        return used

    def _texts(self) -> dict[str, str]:
        start = f"{self.root}extra/"
        names = [name for name in self.records if name.startswith(start)]
        return {
            name.removeprefix(start): self._read(name.removeprefix(self.root), MAX_EXTRA_BYTES).decode(
                "utf-8", "replace"
            )
            for name in names[:16]
        }

    def _read(self, name: str, most: int) -> bytes:
        """Read a record. Raises RefusedError beyond `most` bytes, whatever size the header declares."""
        with self.archive.open(self.records[self.root + name]) as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise RefusedError(f"its record {shown(name)} is too long")
        return content
