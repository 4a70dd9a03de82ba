"""First hours on a machine that the program has not seen: measure it, compare with what was assumed, report.

:mod:`jax_mono.bringup.pages` finds out which memory lies near which die; :mod:`jax_mono.bringup.kit` runs everything
that is worth running on a new node and writes one report.
"""
