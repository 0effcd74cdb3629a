"""Capacity planning: what a cluster would train at, before it is rented. Everything about GPUs is a prediction."""
