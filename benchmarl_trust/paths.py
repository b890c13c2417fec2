"""Where the package's yaml files are."""

from pathlib import Path


def conf_folder() -> Path:
    """The folder of the yaml files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"
