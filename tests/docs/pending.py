"""What pages and recipes already name and the program does not have yet. Empty it: a test says what has come meanwhile."""

PENDING_COMMANDS: set[str] = set()
"""Commands, and options of commands."""
PENDING_SETTINGS: set[str] = set()
"""Settings, or whole sections."""
PENDING_PATHS: set[str] = set()
"""Files and folders of the repository."""
