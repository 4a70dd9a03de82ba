"""Predicts the time of a token from a plan, a topology and micro-benchmarks; docs/simulator.md tells how."""

from __future__ import annotations

from jax_mono.simulate.engine import Simulation, simulate
from jax_mono.simulate.timing import PROGRAMS, Timing, timing

__all__ = ["PROGRAMS", "Simulation", "Timing", "simulate", "timing"]
