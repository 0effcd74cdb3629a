"""Collectives against times worked out by hand: 80 GB/s attained between GPUs, 8 GB/s between machines."""

from dataclasses import replace

import pytest

from tests.trainer.planner.settings import NETWORK, cluster
from trainer.planner.exchange import BUCKET_BYTES, Paths, all_gather_s, all_reduce_s, gradients_s, paths


def test_links_are_those_of_the_network():
    way = paths(cluster(), 8)
    assert (way.local, way.nodes, way.peer_bytes_per_s, way.node_bytes_per_s) == (4, 2, 80e9, 8e9)
    each = cluster(network=replace(NETWORK, link_for_each_gpu=True))
    assert paths(each, 8).node_bytes_per_s == 32e9
    assert paths(cluster(links_per_node=2), 8).node_bytes_per_s == 16e9
    assert [(paths(cluster(), world).local, paths(cluster(), world).nodes) for world in (1, 2, 4, 16)] == [
        (1, 1), (2, 1), (4, 1), (4, 4),
    ]  # fmt: skip


def test_ring_within_a_machine():
    """2 (g-1)/g of 800 MB over 80 GB/s: 1.5 x 10 ms."""
    assert all_reduce_s(paths(cluster(), 4), 800e6) == pytest.approx(15e-3)
    assert all_reduce_s(paths(cluster(), 1), 800e6) == 0


def test_ring_between_machines():
    """15 ms within, and 2 (n-1)/n = 1 x 800 MB over 8 GB/s = 100 ms between."""
    assert all_reduce_s(paths(cluster(), 8), 800e6) == pytest.approx(115e-3)


def test_gather():
    """7/8 of 800 MB over 80 GB/s = 8.75 ms, 1/2 over 8 GB/s = 50 ms."""
    assert all_gather_s(paths(cluster(), 8), 800e6) == pytest.approx(58.75e-3)


def test_latency_grows_with_the_ring_within_and_the_logarithm_between():
    way = Paths(local=4, nodes=8, peer_bytes_per_s=1e30, peer_latency_s=1.0, node_bytes_per_s=1e30, node_latency_s=10.0)
    assert all_gather_s(way, 1) == pytest.approx(3 * 1 + 3 * 10)
    assert all_reduce_s(way, 1) == pytest.approx(2 * 33)


def test_gradients_hide_behind_the_backward():
    """Four full buckets on four GPUs: each 1.5 x 25 MiB / 80 GB/s."""
    way, size = paths(cluster(), 4), 4 * BUCKET_BYTES
    bucket = 1.5 * BUCKET_BYTES / 80e9
    total, exposed = gradients_s(way, size, backward_s=1.0)
    assert (total, exposed) == (pytest.approx(4 * bucket), pytest.approx(bucket))  # the last one never hides
    _, exposed = gradients_s(way, size, backward_s=2 * bucket)
    assert exposed == pytest.approx(4 * bucket - 1.5 * bucket)
    assert gradients_s(paths(cluster(), 1), size, 1.0) == (0, 0)
