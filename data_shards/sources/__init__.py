"""Collections of pictures in every form that people keep them in: `open_source` finds out which."""
