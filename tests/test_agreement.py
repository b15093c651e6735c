"""Real inputs through two networks: what agreement means, what flips weigh, and how little is in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repfuse.checking.agreement import Samples, agreement
from repfuse.checking.results import Flip
from repfuse.errors import RepfuseError


class Scores(nn.Module):
    """Returns its input plus ``shift``: data that are the outputs themselves."""

    def __init__(self, shift: Tensor | float = 0.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.as_tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Reordered(nn.Module):
    """Returns its input with the five highest numbers of each row in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        values, classes = x.topk(5)
        return x.scatter(1, classes, values[:, self.order])


class Always(nn.Module):
    """Returns the same for each sample."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.register_buffer("scores", torch.tensor(scores, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


SCORES = st.integers(2, 9).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(-3, 3).map(float), min_size=classes, max_size=classes), min_size=1, max_size=6
    )
)
DISTINCT = st.integers(6, 9).flatmap(lambda classes: st.lists(st.permutations(range(classes)), min_size=1, max_size=6))


def best_first(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


def itself(data: Any, labels: list[int] | None = None) -> Any:
    """What is said of a network beside itself, whose outputs are ``data``."""
    return agreement(Scores(), Scores(), data, None if labels is None else torch.tensor(labels))


@given(SCORES)
def test_classes_rank_by_output_and_then_by_number(scores: list[list[float]]) -> None:
    for place, labels in enumerate(zip(*map(best_first, scores), strict=True)):
        real = itself(torch.tensor(scores), list(labels))
        assert real.accuracy_original == real.accuracy_fused == (place == 0)
        on_top = float(place < 5) if len(scores[0]) > 5 else None
        assert real.top5_accuracy_original == real.top5_accuracy_fused == on_top


def test_of_many_equal_classes_the_lowest_numbers_come_first() -> None:
    scores = torch.zeros(1, 20_000)
    scores[:, 19_999] = 1
    for place, label in enumerate([19_999, 0, 1, 2, 3, 4]):
        real = itself(scores, [label])
        assert (real.accuracy_original, real.top5_accuracy_original) == (place == 0, place < 5)


@given(SCORES)
def test_a_network_agrees_with_itself(scores: list[list[float]]) -> None:
    real = itself(torch.tensor(scores))
    assert (real.top1_agreement, real.top5_agreement) == (1.0, 1.0 if len(scores[0]) > 5 else None)


@given(DISTINCT, st.permutations(range(5)))
def test_the_order_among_the_best_five_is_free(scores: list[list[int]], order: list[int]) -> None:
    real = agreement(Scores(), Reordered(order), torch.tensor(scores).float(), None)
    assert (real.top1_agreement, real.top5_agreement) == (order[0] == 0, 1.0)


def test_another_class_among_the_best_five_is_no_agreement() -> None:
    other = Scores(torch.tensor([0.0, 0, 0, 0, -1, 1]))
    real = agreement(Scores(), other, torch.tensor([[9.0, 8, 7, 6, 5, 4]]), None)
    assert (real.top1_agreement, real.top5_agreement) == (1.0, 0.0)


@given(SCORES, st.data())
def test_the_label_is_hit_where_it_is_the_first_or_among_five(scores: list[list[float]], data: st.DataObject) -> None:
    classes = len(scores[0])
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=len(scores), max_size=len(scores)))
    places = [best_first(row).index(at) for row, at in zip(scores, labels, strict=True)]
    real = itself(torch.tensor(scores), labels)
    assert real.accuracy_original == pytest.approx(sum(place == 0 for place in places) / len(places))
    on_top = pytest.approx(sum(place < 5 for place in places) / len(places)) if classes > 5 else None
    assert real.top5_accuracy_original == on_top


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ([3.0, 1, -4], 0.5),
        ([0, 0, 0], 0.0),
        ([1e-30, 0, 0], 1.0),
        ([float("inf"), 0, 0], float("inf")),
        ([-2, -1, -1.5], 0.25),
    ],
)
def test_margins_are_relative_to_the_largest_output(scores: list[float], margin: float) -> None:
    flips = agreement(Scores(), Always(0, 0, 1), torch.tensor([scores], dtype=torch.float32), None).flips
    assert flips is not None and (flips.smallest_margin, flips.largest_margin) == (margin, margin)


def test_an_output_that_is_no_number_is_no_class() -> None:
    nan = float("nan")
    real = itself(torch.tensor([[nan, 1.0, 2.0, 0, 0, 0], [0, 1.0, 2.0, 0, 0, 0]]))
    assert (real.top1_agreement, real.top5_agreement, real.without_class) == (0.5, 0.5, 1)
    real = itself(torch.tensor([[nan, 1.0], [0.0, 1.0]]), [1, 1])
    assert (real.top1_agreement, real.accuracy_original, real.without_class) == (0.5, 0.5, 1)
    assert real.flips is not None and real.flips.samples == 1


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2), ()])
def test_other_outputs_are_no_classes(shape: tuple[int, ...]) -> None:
    class Gives(nn.Module):
        def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
            super().__init__()
            self.register_buffer("given", torch.zeros(shape, dtype=dtype))

        def forward(self, _x: Tensor) -> Tensor:
            return self.given + 0

    for network in (Gives(shape), Gives((4, 3), torch.int64)):
        real = agreement(network, network, torch.zeros(4, 3), None)
        assert real.samples == 4
        assert real.top1_agreement is real.top5_agreement is real.flips is None
    network = Gives((4, 3), torch.bfloat16)
    assert agreement(network, network, torch.zeros(4, 3), None).top1_agreement == 1


def test_rankings_join_only_where_all_are_alike() -> None:
    one, other, none = torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2, 2)
    assert (itself([one, one]).samples, itself([one, one]).top1_agreement) == (2, 1.0)
    assert itself([one, other]).top1_agreement is itself([one, none]).top1_agreement is None


def test_flips_are_counted_and_weighed() -> None:
    data = torch.tensor([[1.0, 0.0], [1.0, 0.999], [0.5, 1.0], [1.0, 0.9]])
    real = agreement(Scores(), Scores(torch.tensor([-0.2, 0.0])), data, torch.tensor([0, 0, 1, 1]))
    assert (real.top1_agreement, real.accuracy_original, real.accuracy_fused) == (0.5, 0.75, 0.75)
    assert real.flips is not None
    assert (real.flips.samples, real.flips.right_to_wrong, real.flips.wrong_to_right) == (2, 1, 1)
    assert real.flips.first == (Flip("3", 0, 1, 1), Flip("1", 0, 1, 0))
    worse = agreement(Scores(), Scores(torch.tensor([-0.2, 0.0])), data, torch.tensor([0, 0, 1, 0]))
    assert worse.flips is not None
    assert (worse.flips.samples, worse.flips.right_to_wrong, worse.flips.wrong_to_right) == (2, 2, 0)
    assert real.flips.smallest_margin == pytest.approx(0.001, rel=1e-3)
    assert real.flips.largest_margin == pytest.approx(0.1, rel=1e-6)
    unlabelled = agreement(Scores(), Scores(torch.tensor([-0.2, 0.0])), data, None)
    assert unlabelled.flips is not None and unlabelled.flips.right_to_wrong is None
    assert (unlabelled.flips.samples, unlabelled.accuracy_original) == (2, None)
    named = Samples(4, 2, lambda part: data[part.start : part.stop], names=("a.png", "b.png", "c.png", "d.png"))
    shown = agreement(Scores(), Scores(torch.tensor([-0.2, 0.0])), named, None).flips
    assert shown is not None and shown.first == (Flip("d.png", 0, 1), Flip("b.png", 0, 1))
    all_of_it = agreement(Scores(), Scores(torch.tensor([-9.0, 0.0])), torch.rand(99, 2).sort(descending=True)[0], None)
    assert all_of_it.flips is not None and (all_of_it.flips.samples, len(all_of_it.flips.first)) == (99, 20)


def test_the_best_five_are_told_for_more_than_five_classes() -> None:
    few = agreement(Scores(), Scores(), torch.randn(9, 5), torch.zeros(9).long())
    assert few.top5_agreement is few.top5_accuracy_original is few.top5_accuracy_fused is None
    data = torch.eye(8) * -1
    labels = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    many = agreement(Scores(), Scores(torch.tensor([-9.0] + [0.0] * 7)), data, labels)
    assert (many.top5_agreement, many.top5_accuracy_original, many.top5_accuracy_fused) == (1 / 8, 6 / 8, 6 / 8)


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1], [1, 255, 0]])
def test_labels_that_are_no_classes_of_the_network_are_bad_input(labels: list[int]) -> None:
    for dtype in (torch.int64, torch.int16):
        with pytest.raises(RepfuseError, match="labels") as caught:
            agreement(Scores(), Scores(), torch.randn(3, 2), torch.tensor(labels, dtype=dtype))
        assert "classes 0 to 1" in caught.value.why


def made(asked: list[range], samples: int = 150) -> Samples:
    def make(positions: range) -> Tensor:
        asked.append(positions)
        return torch.tensor([[float(index), 0.0] for index in positions])

    return Samples(samples, 2, make, ("how",))


def test_batches_are_made_once_and_go_through_both_networks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Noted(Scores):
        def forward(self, x: Tensor) -> Tensor:
            events.append((float(self.shift), len(x)))
            return super().forward(x)

    asked: list[range] = []
    monkeypatch.setattr("repfuse.checking.agreement.GROUP", 2)
    real = agreement(Noted(), Noted(1.0), made(asked), None)
    assert (real.samples, real.compared, real.notes) == (150, 64, ("how",))
    assert events == [(0.0, 64), (0.0, 64), (1.0, 64), (1.0, 64), (0.0, 22), (1.0, 22)]
    assert asked == [range(64), range(64, 128), range(128, 150), range(64)]


def test_progress_is_told_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfuse.checking.agreement.GROUP", 1)
    told: list[tuple[str, float]] = []
    agreement(Scores(), Scores(), made([]), None, lambda stage, fraction: told.append((stage, fraction)))
    assert told == [(f"real data, {count} samples", count / 150) for count in (64, 128, 150)]


def test_what_can_be_walked_only_once_is_refused() -> None:
    with pytest.raises(RepfuseError, match="only once"):
        itself(iter([torch.zeros(2, 2)]))
