"""setuptools' build backend, except that torch is a build requirement only where none is installed.

pip builds in an isolated environment that hides the installed packages. Asking for torch there
would download a second one, and build against it. So the environment around the isolated one is
looked at first; setup.py finds torch the same way.
"""

import site
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def installed_torch() -> Path | None:
    """The folder of the torch package of this interpreter, seen from inside or outside isolation."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if (Path(folder) / "torch" / "version.py").is_file():
            return Path(folder) / "torch"
    return None


def _with_torch(requires: list[str]) -> list[str]:
    return requires if installed_torch() else [*requires, "torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
