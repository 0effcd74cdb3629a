"""Threads that each do a piece of work of their own, where operations are many and short."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Map = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]


@contextmanager
def workers(device: torch.device) -> Iterator[tuple[int, Map]]:
    """How many threads work, and a `map` by them, whose results come in order.

    On a CPU each of torch's threads works by itself and no operation is spread over threads: to gather them after each of many
    short ones costs more than it, above all where other processes use the cores. On a GPU there is one, the caller's.
    """
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count == 1:
        yield 1, lambda function, values: [function(value) for value in values]
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield count, lambda function, values: list(pool.map(function, values))
        finally:
            torch.set_num_threads(count)
