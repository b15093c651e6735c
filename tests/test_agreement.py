"""Real inputs through two networks: what agreement means, what flips weigh, and how little is in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repfuse.checking.agreement import (
    NONE,
    Ranking,
    Samples,
    agreement,
    chunks,
    class_count,
    data_trial,
    joined,
    ranking,
)
from repfuse.checking.results import Flip
from repfuse.errors import RepfuseError


class Scores(nn.Module):
    """Returns its input plus ``shift``: data that are the outputs themselves."""

    def __init__(self, shift: Tensor | float = 0.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.as_tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def ranked(scores: Any) -> Ranking:
    found = ranking(torch.as_tensor(scores))
    assert found is not None
    return found


SCORES = st.integers(2, 9).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(-3, 3).map(float), min_size=classes, max_size=classes), min_size=1, max_size=6
    )
)


@given(SCORES)
def test_classes_rank_by_output_and_then_by_number(scores: list[list[float]]) -> None:
    expected = [sorted(range(len(row)), key=lambda c: (-row[c], c))[:5] for row in scores]
    assert ranked(scores).best.tolist() == expected
    assert ranked(scores).first.tolist() == torch.tensor(scores).argmax(dim=1).tolist()


def test_of_many_equal_classes_the_lowest_numbers_come_first() -> None:
    scores = torch.zeros(3, 20_000)
    scores[:, 19_999] = 1
    assert ranked(scores).best.tolist() == [[19_999, 0, 1, 2, 3]] * 3


@given(SCORES, st.permutations(range(5)))
def test_a_network_agrees_with_itself_and_the_order_among_the_best_five_is_free(
    scores: list[list[float]], order: list[int]
) -> None:
    found = ranked(scores)
    assert found.agrees(found).all() and found.agrees_on_top(found).all()
    shuffled = replace(found, best=found.best[:, [index for index in order if index < found.best.shape[1]]])
    assert found.agrees_on_top(shuffled).all()


def test_another_class_among_the_best_five_is_no_agreement() -> None:
    before, after = ranked([[9.0, 8, 7, 6, 5, 4]]), ranked([[9.0, 8, 7, 6, 4, 5]])
    assert before.agrees(after).all()
    assert not before.agrees_on_top(after).any()


@given(SCORES, st.data())
def test_the_label_is_hit_where_it_is_the_first_or_among_five(scores: list[list[float]], data: st.DataObject) -> None:
    classes = len(scores[0])
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=len(scores), max_size=len(scores)))
    found = ranked(scores)
    places = [
        sorted(range(classes), key=lambda c: (-row[c], c)).index(at) for row, at in zip(scores, labels, strict=True)
    ]
    first, on_top = found.accuracy(torch.tensor(labels))
    assert first == pytest.approx(sum(place == 0 for place in places) / len(places))
    assert on_top == (pytest.approx(sum(place < 5 for place in places) / len(places)) if classes > 5 else None)


def test_margins_are_relative_to_the_largest_output() -> None:
    found = ranked([[3.0, 1, -4], [0, 0, 0], [1e-30, 0, 0], [float("inf"), 0, 0], [-2, -1, -1.5]])
    assert found.margins.tolist() == [0.5, 0.0, 1.0, float("inf"), 0.25]


def test_an_output_that_is_no_number_is_no_class() -> None:
    nan = float("nan")
    found = ranked([[nan, 1.0, 2.0, 0, 0, 0], [0, 1.0, 2.0, 0, 0, 0]])
    assert found.first.tolist() == [NONE, 2]
    assert found.agrees(found).tolist() == found.agrees_on_top(found).tolist() == [False, True]
    real = agreement(Scores(), Scores(), torch.tensor([[nan, 1.0], [0.0, 1.0]]), torch.tensor([1, 1]))
    assert (real.top1_agreement, real.accuracy_original, real.without_class) == (0.5, 0.5, 1)
    assert real.flips is not None and real.flips.samples == 1


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2), ()])
def test_other_outputs_are_no_classes(shape: tuple[int, ...]) -> None:
    assert ranking(torch.zeros(shape)) is None
    assert ranking(torch.zeros(4, 3, dtype=torch.int64)) is None
    assert ranking(torch.zeros(4, 3, dtype=torch.bfloat16)) is not None


def test_rankings_join_only_where_all_are_alike() -> None:
    one, other = ranked([[1.0, 2]]), ranked([[1.0, 2, 3]])
    assert joined([one, one]) is not None and len(joined([one, one]).best) == 2  # type: ignore[union-attr]
    assert joined([one, other]) is joined([one, None]) is joined([]) is None


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


def test_the_trial_makes_the_first_batch_alone() -> None:
    asked: list[range] = []
    assert len(data_trial(made(asked)).inputs[0]) == 64
    assert asked == [range(64)]


def test_progress_is_told_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfuse.checking.agreement.GROUP", 1)
    told: list[tuple[str, float]] = []
    agreement(Scores(), Scores(), made([]), None, lambda stage, fraction: told.append((stage, fraction)))
    assert told == [(f"real data, {count} samples", count / 150) for count in (64, 128, 150)]


def test_what_can_be_walked_only_once_is_refused() -> None:
    with pytest.raises(RepfuseError, match="only once"):
        next(chunks(iter([torch.zeros(2, 2)])))


def test_the_number_of_classes_is_that_of_the_first_output() -> None:
    assert class_count(Scores(), (torch.zeros(1, 7),)) == 7
    assert class_count(Scores(), (torch.zeros(1, 7, 2),)) is None
    assert class_count(nn.Linear(3, 4), (torch.zeros(1, 7),)) is None  # it cannot run this: verify will say so
