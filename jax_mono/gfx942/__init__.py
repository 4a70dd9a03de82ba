"""The resident program for AMD's MI300X as a file, made without ROCm and without a GPU.

A GPU that is here compiles its program with hipRTC (:mod:`jax_mono.native`). This package compiles the same sources
with clang and lld, to read what became of them or to take the program elsewhere: ``python -m jax_mono.gfx942 --help``.
"""
