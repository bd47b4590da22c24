from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from alignlab.training.signals import SIGNALS, StopRequest


def send(name: str) -> None:
    """To this very process; Python runs the handler before the next line."""
    signal.raise_signal(getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_signal_asks_to_stop_and_is_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop
        assert stop.signal is None
        send(name)
        assert stop
        assert stop.signal == name
    said = capfd.readouterr().err
    assert f"{name}: stopping after this step" in said
    assert ("Ctrl-C again" in said) == (name == "SIGINT")


def test_a_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send("SIGINT")
        assert stop
        send("SIGINT")


def test_the_first_signal_is_the_reason_and_others_do_not_hurt() -> None:
    with StopRequest() as stop:
        for name in ("SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT"):
            send(name)
        assert stop.signal == "SIGTERM"


def test_former_handlers_come_back_also_after_an_exception() -> None:
    def mine(_number: int, _frame: object) -> None:
        raise AssertionError("not within a StopRequest")

    at_first = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(ValueError, match="body"), StopRequest() as stop:
            send("SIGUSR1")
            assert stop
            raise ValueError("body")
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert signal.getsignal(signal.SIGTERM) is at_first["SIGTERM"]
        assert signal.getsignal(signal.SIGINT) is at_first["SIGINT"]
    finally:
        signal.signal(signal.SIGUSR1, at_first["SIGUSR1"])


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send("SIGHUP")
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, former)


def test_in_another_thread_nothing_is_installed() -> None:
    handlers: list[object] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with StopRequest() as stop:
                handlers.extend(signal.getsignal(getattr(signal, name)) for name in SIGNALS)
                assert not stop
        except BaseException as error:
            errors.append(error)

    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert handlers == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_process_signalled_from_outside_finishes_its_step(name: str) -> None:
    """Without the handler, each of these would end it by the signal; here it leaves its loop and reports the step."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(2)  # a closed standard error must not matter
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        with StopRequest() as stop:
            os.write(write, b"ready ")
            while not stop:
                time.sleep(0.005)
            os.write(write, b"done")
        os._exit(17)
    os.close(write)
    assert os.read(read, 6) == b"ready "
    os.kill(pid, getattr(signal, name))
    _, status = os.waitpid(pid, 0)
    assert os.read(read, 4) == b"done"
    os.close(read)
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 17
