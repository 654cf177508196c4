"""Where things lie: the files that come with slitlamp, and the folders in which a configuration may name files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slitlamp.errors import InputError

_PACKAGE = Path(__file__).resolve().parent.parent


def data_folders(kind: str) -> list[Path]:
    """Where the `datasets` or `experiments` that come with slitlamp are: in the checkout, then in the package."""
    packaged = _PACKAGE / "data" if kind == "datasets" else _PACKAGE / "data" / kind
    checkout = _PACKAGE.parent
    # In an installed package the folder above is site-packages, whose `datasets` is Hugging Face's and holds no data.
    ours = [checkout / kind] if (checkout / "pyproject.toml").is_file() else []
    return [folder for folder in [*ours, packaged] if folder.is_dir()]


def recorded(path: Path) -> str:
    """How a run's configuration names a file: as seen from the experiments that come with slitlamp, or from the working
    directory, if it lies in one of them, so that it is found again in another checkout or installation.
    """
    whole = path.resolve()
    for folder in (*data_folders("experiments"), Path.cwd()):
        if whole.is_relative_to(folder.resolve()):
            return whole.relative_to(folder.resolve()).as_posix()
    return str(whole)


def inside(path: str | Path, folders: Sequence[Path], what: str) -> Path:
    """The file or folder that a configuration names, relative to one of `folders` and inside one of them.

    Raises InputError if it lies outside all of them. The first folder in which it exists wins; if it exists in none, it
    is taken to be in the first.
    """
    wanted = Path(path).expanduser()
    candidates = [(folder / wanted).resolve() for folder in folders]
    allowed = [one for one in candidates if any(one.is_relative_to(folder.resolve()) for folder in folders)]
    if not allowed:
        shown = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"{what}: {path} lies outside the folders of this configuration ({shown}); name its folder under 'folders:'"
        )
    return next((one for one in allowed if one.exists()), allowed[0])
