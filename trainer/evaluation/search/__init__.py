"""Neighbours exactly by all ranks, approximately, and everything that looks at all pairs of a set."""
