"""Files, signals and folders of runs, on which all else stands."""

import os
import signal
from os.path import samestat

import pytest

from lm.base import signals
from lm.base.errors import Busy, Interrupted
from lm.base.files import atomic_write
from lm.base.run_id import locked, remove_finished
from lm.base.signals import CatchSignals


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_write_returns(
    tmp_path, monkeypatch
):
    done, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(number):
        places = (tmp_path, *tmp_path.iterdir())
        (name,) = [path for path in places if samestat(path.stat(), os.fstat(number))]
        done.append(("on the disk", str(name)))
        fsync(number)

    def watched_replace(old, new):
        done.append(("renamed", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    file = tmp_path / "file"
    atomic_write(file, b"old")
    assert done == [
        ("on the disk", f"{file}.tmp"),
        ("renamed", str(file)),
        ("on the disk", str(tmp_path)),
    ]
    done.clear()
    atomic_write(file, [b"n", b"ew"], durable=False)
    assert done == [("renamed", str(file))]
    assert file.read_bytes() == b"new"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def torn():
        yield b"half"
        raise KeyboardInterrupt

    atomic_write(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", torn())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_the_first_signal_is_noted_and_the_second_ends_the_process():
    with CatchSignals() as caught:
        caught.leave("not yet")
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="saved") as stopped:
            caught.leave("saved")
        assert stopped.value.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_a_launcher_repeats_is_one_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with CatchSignals() as caught:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert caught.caught == signal.SIGINT
        monkeypatch.setattr(signals, "_REPEATED_S", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_folder_of_a_finished_run_goes_unless_it_is_in_use(tmp_path):
    lock = locked(tmp_path / "run")
    with pytest.raises(Busy, match=f"process {os.getpid()} is training this run"):
        locked(tmp_path / "run")
    remove_finished(tmp_path / "run")
    assert (tmp_path / "run").is_dir()
    lock.close()
    remove_finished(tmp_path / "run")
    assert not (tmp_path / "run").exists()
