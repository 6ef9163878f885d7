"""The probe keeps to its share of the training time."""

from types import SimpleNamespace

import numpy as np
import pytest

from meap_lit.callbacks import RetrievalProbe
from meap_lit.callbacks import retrieval as module
from meap_lit.errors import UserError


def count_probes(monkeypatch, max_share, cost_s, gap_s=100.0, validations=20):
    """Probes among so many validations, `gap_s` of training apart, when each takes `cost_s`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    probe = RetrievalProbe(lengths=[8], max_share=max_share)
    probe._items = ["an item"]
    counted = []

    def ask(trainer, pl_module):
        counted.append(clock.now)
        clock.now += cost_s

    monkeypatch.setattr(probe, "_probe", ask)
    trainer = SimpleNamespace(sanity_checking=False, strategy=SimpleNamespace(broadcast=lambda value: value))
    probe.on_train_start(trainer, None)
    for _ in range(validations):
        clock.now += gap_s
        probe.on_validation_epoch_end(trainer, None)
    return len(counted), len(counted) * cost_s / clock.now


@pytest.mark.parametrize(
    ("max_share", "cost_s", "expected"),
    [
        (0.02, 1.0, 20),  # 1%: at every validation
        (0.02, 10.0, 4),  # 40 s of 2,040
        (0.02, 1000.0, 1),  # the first is not known to cost so much
        (1.0, 50.0, 20),
    ],
)
def test_the_probe_keeps_to_its_share(monkeypatch, max_share, cost_s, expected):
    count, share = count_probes(monkeypatch, max_share, cost_s)
    assert count == expected
    assert share <= max_share or count == 1


@pytest.mark.parametrize("share", [0, 1.5, np.nan])
def test_a_wrong_share_is_named(share):
    with pytest.raises(UserError, match=r"^probe.max_share must be in \(0, 1\], got "):
        RetrievalProbe(max_share=share)
