"""Trained networks as files that others read: one module a format. Weights are always float32."""
