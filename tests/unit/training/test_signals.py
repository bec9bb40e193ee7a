"""Stop signals are remembered; the second Ctrl-C quits."""

from __future__ import annotations

import os
import signal

import pytest

from hope_megatron.training.signals import STOP_SIGNALS, StopRequest, signal_name


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_remembered_and_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) is before


def test_second_ctrl_c_quits_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGTERM


def test_names():
    assert signal_name(signal.SIGINT) == "Ctrl-C"
    assert signal_name(signal.SIGUSR1) == "SIGUSR1"
