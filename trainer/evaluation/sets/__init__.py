"""The field's own test sets."""
