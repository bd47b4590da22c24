"""What is known of devices, and the estimate of speed, by hand."""

from __future__ import annotations

import pytest

from alignlab.core import ConfigError
from alignlab.planning.devices import KNOWN, find_device, speed


def test_devices() -> None:
    assert find_device("H100") == KNOWN["h100"] and find_device("a100-80gb") == KNOWN["a100"]
    assert find_device(24).memory == 24e9 and find_device("40gb").memory == 40e9
    assert find_device("cpu").name == "cpu"
    for wrong in ("h300", -3, 0, "inf"):
        with pytest.raises(ConfigError, match="gpu="):
            find_device(wrong)


def test_speed_by_hand() -> None:
    """6 operations a parameter and token, 4 with an adapter, 2 more for a reference or recomputing; sampling reads the
    weights once for all rows."""
    a100 = KNOWN["a100"]
    full = speed(a100, 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=4)
    assert full.trained == pytest.approx(0.4 * 312e12 / (6 * 7e9))
    assert full.sampled == pytest.approx(4 * 0.4 * 2.039e12 / 14e9)
    assert speed(a100, 7e9, 0, 14e9, checkpointing=False, reference=False).operations == 4 * 7e9
    assert speed(a100, 7e9, 7e9, 14e9, checkpointing=True, reference=True).operations == 10 * 7e9
    many = speed(a100, 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=10**6)
    assert many.sampled == pytest.approx(0.4 * 312e12 / (2 * 7e9))
    assert speed(find_device(24), 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=4).trained is None
