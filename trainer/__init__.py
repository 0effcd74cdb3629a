"""Embedding network, cross-rank triplet mining, training and evaluation."""
