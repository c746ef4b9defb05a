"""Curves: bounded, exact, and independent of where a run was interrupted."""

import csv
import io
import json
import math

import pytest

from lm.runs.history import MAX_ROWS, Clock, History


def record(step):
    extra = {"valid_loss": 100.0 - step} if step % 50 == 0 else {}
    return {
        "step": step,
        "tokens": 10 * step,
        "train_loss": float(step % 7),
        "learning_rate": 1 / step,
        "grad_norm": 2.0 * step,
        "step_s": 0.1,
        **extra,
    }


def run(first, last, history):
    for step in range(first, last + 1):
        history.add(record(step))
    return history


def rows(history):
    return list(csv.DictReader(io.StringIO(history.to_csv().decode())))


def test_every_step_is_a_row_while_they_fit():
    got = rows(run(1, 120, History()))
    assert [int(row["step"]) for row in got] == list(range(1, 121))
    assert History().to_csv() == b"step,tokens,train_loss,valid_loss,learning_rate,grad_norm\n"
    history = History()
    history.add(record(1) | {"tokens": 12_345_678_901})
    assert rows(history)[0]["tokens"] == "12345678901"
    assert [row["valid_loss"] for row in got].count("nan") == 118


def test_rows_stay_bounded_and_are_means():
    history = run(1, 5 * MAX_ROWS + 3, History())
    got = rows(history)
    assert MAX_ROWS / 2 <= len(got) <= MAX_ROWS
    width = int(got[0]["step"])
    assert width == history.interval == 8
    expected = sum(step % 7 for step in range(1, width + 1)) / width
    assert float(got[0]["train_loss"]) == pytest.approx(expected)
    assert int(got[-1]["step"]) == 5 * MAX_ROWS + 3


def test_no_validation_is_lost_when_rows_merge():
    got = rows(run(1, 3 * MAX_ROWS, History()))
    values = [float(row["valid_loss"]) for row in got if row["valid_loss"] != "nan"]
    assert values == [100.0 - step for step in range(50, 3 * MAX_ROWS + 1, 50)]


@pytest.mark.parametrize("cut", [1, 999, 1000, 1777])
def test_a_restored_history_goes_on_as_if_never_stopped(cut):
    state = json.loads(json.dumps(run(1, cut, History()).state()))
    resumed = run(cut + 1, 2500, History.restore(state))
    straight = run(1, 2500, History())
    assert resumed.to_csv() == straight.to_csv()
    assert resumed.average_loss == straight.average_loss


def test_average_loss_is_a_weighted_mean_from_the_start():
    history = History()
    for loss in (4.0, 2.0):
        history.add(record(1) | {"train_loss": loss})
    assert history.average_loss == pytest.approx((0.95 * 4.0 + 2.0) / 1.95)


def test_a_skipped_step_counts_in_no_mean():
    history = History()
    history.interval = 2
    for step, loss in [(1, 2.0), (2, None), (3, None), (4, None)]:
        record = {"step": step, "tokens": step, "learning_rate": 0.1}
        if loss is None:
            record |= {"train_loss": math.nan, "grad_norm": math.nan, "skipped": "why"}
        else:
            record |= {"train_loss": loss, "grad_norm": 1.0}
        history.add(record)
    assert history.average_loss == 2.0
    assert history.to_csv().decode().split("\n")[1:3] == ["2,2,2,nan,0.1,1", "4,4,nan,nan,0.1,nan"]
    assert History.restore(json.loads(json.dumps(history.state(), allow_nan=False))).rows
    assert math.isnan(History().average_loss)


def test_a_clock_goes_on_where_it_was_cut_and_knows_every_row():
    history, clock = History(), Clock()
    for step in range(1, 2 * MAX_ROWS + 4):
        history.add(record(step))
        clock.tick(step, step / 4, history)
    assert len(clock.elapsed_s) <= MAX_ROWS + 4  # bounded, as the rows are
    text = history.to_csv(clock)
    last = int(rows(history)[500]["step"])
    cut = Clock.from_csv(text, resumed_at=last)
    assert max(cut.elapsed_s) == last
    cut.tick(last + 1, 0.5, history)
    assert cut.elapsed_s[last + 1] == last / 4 + 0.5
    timed = list(csv.DictReader(io.StringIO(text.decode())))
    assert [float(row.pop("elapsed_s")) for row in timed] == [int(r["step"]) / 4 for r in timed]
    assert timed == rows(history)


@pytest.mark.parametrize(
    "torn", [b"", b"\xff\xfe", b"step,elaps", b"step,elapsed_s\n1,0.5\n2", b"step\n1\n", b"\0" * 99]
)
def test_times_that_are_lost_stay_unknown_and_stop_nothing(torn):
    clock = Clock.from_csv(torn, resumed_at=5)
    clock.tick(6, 0.5, History())
    assert 6 not in clock.elapsed_s  # not 0.5 s after the beginning


def test_steps_of_unknown_time_say_nan():
    history, clock = run(1, 3, History()), Clock()
    clock.tick(3, 1.5, history)
    assert [line.split(b",")[-1] for line in history.to_csv(clock).splitlines()] == [
        b"elapsed_s", b"nan", b"nan", b"1.5"]  # fmt: skip
    assert Clock.from_csv(history.to_csv(clock)).elapsed_s == {3: 1.5}
