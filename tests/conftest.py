"""Files that take longest begin first, so that no process works alone at the end (`--dist loadfile --no-loadscope-reorder`)."""

LONGEST = (
    "tests/distributed/test_faults.py",
    "tests/distributed/test_training.py",
    "tests/distributed/test_launch.py",
    "tests/data_shards/test_interruption.py",
    "tests/distributed/test_exact_gradients.py",
    "tests/data_shards/test_streamed_training.py",
    "tests/distributed/",
)


def pytest_collection_modifyitems(items) -> None:
    def rank(item) -> int:
        return next((place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=rank)
