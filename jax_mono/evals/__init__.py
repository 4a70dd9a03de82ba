"""Evaluations of a model as it runs here: bits per byte of given text, and programs that it writes.

``problems`` reads HumanEval and HumanEval+, ``writing`` lets a decoder write samples, ``checking`` runs them in the
``sandbox``, ``pass_at_k`` and ``table`` sum up. ``bits`` scores text. ``agreement`` reads what the resident program
wrote with the reference model.
"""
