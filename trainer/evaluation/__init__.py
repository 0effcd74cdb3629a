"""Embed -> index -> protocols -> report."""
