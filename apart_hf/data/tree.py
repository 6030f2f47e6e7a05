"""Folders of files as a user has them: links are followed, and what is no image of theirs is left out."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image as PIL

from apart_hf.errors import ApartError

# formats that Pillow opens, and that hold no photograph: films, drawings, weather maps
_NO_IMAGES = (".mpg", ".mpeg", ".ps", ".eps", ".wmf", ".emf", ".bufr", ".grib", ".h5", ".hdf", ".pdf", ".iim")
_THUMBNAILS = {"thumbnails", "thumbs"}
# what NAS boxes, archives and bins leave: never a user's own
_SYSTEM = {"@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information", "thumbs.db"}


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the endings, in lower case, of the files that Pillow opens as images (HEIC where pillow-heif is there)."""
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    PIL.init()
    found = {ending for ending, kind in PIL.registered_extensions().items() if kind in PIL.OPEN}
    return frozenset(ending for ending in found if ending not in _NO_IMAGES)


def extension(name: str) -> str:
    """Return the ending of a file's name, with its dot, in lower case."""
    return name[name.rfind(".") :].lower() if "." in name else ""


class Folder:
    """Holds what is in one folder, read at the first question.

    Hidden files and folders, those of the system, folders of thumbnails and the folders of runs of this package are no
    part of it. Links are followed.

    Args:
        path: where it is.
        name: its own name; of a link the link's.
        real: (path, ...) of it and of those above it, with links resolved, by which a loop is known.
        inside: its path in the data, for messages; empty for the root.
    """

    def __init__(self, path: str, name: str = "", real: tuple[str, ...] = (), inside: str = ""):
        self.path, self.name, self.inside = path, name, inside
        self._real = real or (os.path.realpath(path),)

    @functools.cached_property
    def _entries(self) -> tuple[list[str], list[str], list[Folder], list[str], bool]:
        """Files that are images, other files, folders, the names of folders left out, and whether runs are here."""
        try:
            with os.scandir(self.path) as found:
                listed = [(entry.name, entry.is_dir(), entry.is_symlink()) for entry in found]
        except OSError as error:
            raise ApartError(f"cannot read the folder {self.path}: {error.strerror}; mend it or remove it.") from error
        images, others, folders, left_out = [], [], [], []
        known = image_extensions()
        for name, is_folder, is_link in listed:
            if name.startswith(".") or name.lower() in _SYSTEM:
                if is_folder:
                    left_out.append(name)
            elif is_folder and name.lower() in _THUMBNAILS:
                left_out.append(name)
            elif is_folder:
                folders.append(self._below(name, is_link))
            elif name[name.rfind(".") :].lower() in known:
                images.append(name)
            else:
                others.append(name)
        runs = [folder for folder in folders if folder.is_run]
        kept = [folder for folder in folders if not folder.is_run]
        return sorted(images), sorted(others), sorted(kept, key=lambda one: one.name), sorted(left_out), bool(runs)

    def _below(self, name: str, is_link: bool) -> Folder:
        path, inside = f"{self.path}/{name}", f"{self.inside}{name}/"
        real = os.path.realpath(path) if is_link else f"{self._real[-1]}/{name}"
        if real in self._real:
            raise ApartError(f"{path} is a link to a folder that it lies in, which has no end; remove the link.")
        return Folder(path, name, (*self._real, real), inside)

    @functools.cached_property
    def is_run(self) -> bool:
        """Tell whether this is the folder of a run of this package, whose pictures are no data."""
        path = Path(self.path)
        return (path / "config.yaml").is_file() and ((path / "checkpoints").is_dir() or (path / "plots").is_dir())

    @property
    def images(self) -> list[str]:
        """Return the names of the image files directly in it, in order."""
        return self._entries[0]

    @property
    def others(self) -> list[str]:
        """Return the names of the other files directly in it, in order."""
        return self._entries[1]

    @property
    def folders(self) -> list[Folder]:
        """Return the folders directly in it, in order."""
        return self._entries[2]

    @property
    def left_out(self) -> list[str]:
        """Return the names of the folders in it that are no part of it: hidden, the system's, thumbnails."""
        return self._entries[3]

    @property
    def held_runs(self) -> bool:
        """Tell whether the folder of a run was left out of it, or of a folder below it."""
        return self._entries[4] or any(folder.held_runs for folder in self.folders)

    def walk(self) -> Iterator[Folder]:
        """Yield it and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    @functools.cached_property
    def has_images(self) -> bool:
        """Tell whether an image is in it, or in a folder below it."""
        return bool(self.images) or any(folder.has_images for folder in self.folders)

    def files(self) -> Iterator[str]:
        """Yield the paths of all images in it and below it, in the order of these paths."""
        if not self.folders:
            yield from (f"{self.path}/{name}" for name in self.images)
            return
        below = [(name, None) for name in self.images] + [(f"{one.name}/", one) for one in self.folders]
        for name, folder in sorted(below, key=lambda pair: pair[0]):
            if folder is None:
                yield f"{self.path}/{name}"
            else:
                yield from folder.files()

    def other_files(self, *endings: str) -> list[str]:
        """List the paths within the data of all other files in it and below it that end so."""
        return [f"{one.inside}{name}" for one in self.walk() for name in one.others if name.lower().endswith(endings)]
