"""Signals of a scheduler: noted once, harmless after that, ignored by a process on its way out."""

import os
import signal
import threading

import pytest

from mmd2v.distributed.preemption import STOP_SIGNALS, Preempted, StopSignals


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_only_the_first_signal_counts_and_both_are_ignored_afterwards():
    with StopSignals() as signals:
        assert signals.asked is None and signals.number == 0
        _send(signal.SIGUSR1)
        _send(signal.SIGTERM)
        assert signals.asked == "SIGUSR1" and signals.number == signal.SIGUSR1
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS)
    _send(signal.SIGTERM)  # would end this process


def test_without_a_signal_the_handlers_of_before_return():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_rank_that_was_sent_none_ignores_them_too_when_all_leave():
    with pytest.raises(Preempted), StopSignals():
        raise Preempted("another rank was asked")
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS)


def test_run_shares_what_its_command_has_noted():
    with StopSignals() as outer:
        _send(signal.SIGTERM)
        with StopSignals() as inner:
            assert inner.asked == "SIGTERM"
        assert outer.asked == "SIGTERM" and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_other_threads_note_nothing():
    found = []

    def listen() -> None:
        with StopSignals() as signals:
            found.append(signals.asked)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [None]
