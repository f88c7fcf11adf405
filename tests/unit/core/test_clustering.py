"""K-means on a line against brute force, and how many clusters are taken."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.clustering import Selection, choose, cluster, find_cutoffs, silhouette

THREE_GROUPS = [1.0, 1.1, 1.2, 5.0, 5.1, 5.2, 9.0, 9.1, 9.2]


def cutoffs(
    sizes: list[float], selection: Selection, *, k_max: int = 4, sample: int = 512
) -> tuple[float, ...]:
    return find_cutoffs(sizes, k_max=k_max, selection=selection, elbow=0.1, sample=sample)


def least_wcss(values: list[float], k: int) -> float:
    """The best of all ways to cut sorted values into k intervals."""
    ways = (
        [values[start:end] for start, end in zip((0, *cuts), (*cuts, len(values)), strict=True)]
        for cuts in combinations(range(1, len(values)), k - 1)
    )
    return min(
        sum(sum((one - sum(part) / len(part)) ** 2 for one in part) for part in parts)
        for parts in ways
    )


sizes = st.one_of(st.integers(0, 12).map(float), st.floats(1e-3, 1e4))


@given(st.lists(sizes, min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_other_division_has_less_wcss(values: list[float], k_max: int) -> None:
    values.sort()
    found = cluster(np.array(values), k_max)
    assert len(found) == min(k_max, len(set(values)))
    scale = 1e-9 * (1 + max(values) ** 2)
    for k, clusters in enumerate(found, start=1):
        assert len(clusters.starts) == len(clusters.centroids) == k
        assert clusters.wcss == pytest.approx(least_wcss(values, k), abs=scale)
        parts = np.split(np.array(values), clusters.starts[1:])
        inside = sum(float(((part - part.mean()) ** 2).sum()) for part in parts)
        assert inside == pytest.approx(clusters.wcss, abs=scale)
        assert list(clusters.cutoffs) == sorted(set(clusters.cutoffs))


@pytest.mark.parametrize("selection", ["elbow", "silhouette"])
def test_a_sound_rule_finds_three_groups_cut_halfway_between_their_means(
    selection: Selection,
) -> None:
    assert cutoffs(THREE_GROUPS, selection) == pytest.approx((3.1, 7.1))


def test_the_papers_rule_always_takes_the_most_clusters() -> None:
    assert len(cutoffs(THREE_GROUPS, "paper")) == 3
    assert len(cutoffs(THREE_GROUPS, "paper", k_max=6)) == 5


@pytest.mark.parametrize("selection", ["paper", "elbow", "silhouette"])
def test_equal_sizes_make_one_queue(selection: Selection) -> None:
    assert cutoffs([2.0] * 50, selection) == ()
    assert cutoffs([2.0], selection) == ()


def test_wcss_by_hand() -> None:
    # {1, 2}, {6, 8}: means 1.5 and 7, squares 0.25 + 0.25 + 1 + 1; one cluster: mean 4.25
    one, two = cluster(np.array([1.0, 2.0, 6.0, 8.0]), 2)
    assert one.wcss == pytest.approx(10.5625 + 5.0625 + 3.0625 + 14.0625)
    assert two.wcss == pytest.approx(2.5)
    assert (two.centroids, two.cutoffs) == ((1.5, 7.0), (4.25,))


def test_silhouette_by_hand() -> None:
    # 0 and 1: a = 1, b = 10 and 9; 10 is alone and counts 0
    values = np.array([0.0, 1.0, 10.0])
    _, two = cluster(values, 2)
    assert silhouette(values, two) == pytest.approx((9 / 10 + 8 / 9 + 0) / 3)


def test_the_elbow_of_even_sizes_is_three_queues() -> None:
    # WCSS falls as 1/K²: the 2nd, 3rd and 4th cluster explain 75, 14 and 5 % of the variance
    values = np.linspace(0, 1, 300)
    found = cluster(values, 4)
    assert len(choose(values, found, selection="elbow", elbow=0.1).centroids) == 3
    assert len(choose(values, found, selection="elbow", elbow=0.2).centroids) == 2
    assert len(choose(values, found, selection="elbow", elbow=0.0).centroids) == 4


def test_a_sample_of_the_sorted_sizes_gives_about_the_same_cut_offs() -> None:
    many = [float(one) for one in np.random.default_rng(1).lognormal(size=4000)]
    sampled = cutoffs(many, "paper", sample=512)
    assert sampled == cutoffs(many[::-1], "paper", sample=512)  # whatever their order
    assert sampled[0] == pytest.approx(cutoffs(many, "paper", sample=1500)[0], rel=0.1)
