"""``python -m jax_mono`` is the command ``jax-mono``."""

from __future__ import annotations

import sys

from jax_mono.cli import main

sys.exit(main())
