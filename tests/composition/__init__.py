"""Proof by composition: random programs, run with regions and without, compared to the bit."""
