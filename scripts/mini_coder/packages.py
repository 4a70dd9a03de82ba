"""The packages whose Python source is the data, with the licences that they must declare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package on PyPI.

    Attributes:
        name: Its name there.
        version: The version; wheels never change.
        licence: SPDX identifier.
        declared: What its metadata must say, in one of the fields that name a licence.
        held_out: Whether it is kept from training, to measure on.
    """

    name: str
    version: str
    licence: str
    declared: str
    held_out: bool = False


PACKAGES = (
    Package("networkx", "3.6.1", "BSD-3-Clause", "BSD-3-Clause", held_out=True),
    Package("astropy", "8.0.2", "BSD-3-Clause", "BSD-3-Clause"),
    Package("django", "5.2.19", "BSD-3-Clause", "BSD-3-Clause"),
    Package("homeassistant", "2024.3.3", "Apache-2.0", "Apache-2.0"),
    Package("matplotlib", "3.11.2", "PSF-2.0", "OSI Approved :: Python Software Foundation License"),
    Package("pandas", "3.1.1", "BSD-3-Clause", "BSD-3-Clause"),
    Package("scikit-learn", "1.9.1", "BSD-3-Clause", "BSD-3-Clause"),
    Package("scipy", "1.17.1", "BSD-3-Clause", "OSI Approved :: BSD License"),
    Package("sqlalchemy", "2.1.9", "MIT", "MIT"),
    Package("statsmodels", "0.15.0", "BSD-3-Clause", "BSD-3-Clause"),
    Package("sympy", "1.14.0", "BSD-3-Clause", "OSI Approved :: BSD License"),
    Package("transformers", "5.23.0", "Apache-2.0", "Apache 2.0 License"),
)
"""Large, well known, and with a permissive licence. The held-out one comes first: what others copied from it goes."""

WHEEL_PYTHON, WHEEL_PLATFORM = "3.11", "manylinux_2_28_x86_64"
"""Whose wheels are taken, wherever this runs, so that the data is the same."""

STANDARD_LIBRARY = "cpython-stdlib"
STANDARD_LIBRARY_LICENCE = "PSF-2.0"
