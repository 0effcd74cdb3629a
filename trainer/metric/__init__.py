"""Maths on tensors and ints: no accelerate, no torch.distributed, no I/O."""
