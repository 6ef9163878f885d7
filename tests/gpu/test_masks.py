"""Masks on a GPU: those of a CPU to the bit, drawn without waiting for the device."""

import pytest
import torch
from torch import Tensor

from meap_lit.masking import mask_inputs
from tests.support.devices import on_devices, on_gpu


@on_devices
@pytest.mark.parametrize(("seed", "step", "span_len"), [(0, 0, 1), (2**63 + 5, 190_000, 1), (-3, 17, 4)])
def test_every_device_draws_the_same_mask(device: str, seed: int, step: int, span_len: int) -> None:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(0, 100, (16, 4096), generator=generator)
    sample_ids = torch.randint(-(2**62), 2**62, (16,), generator=generator)
    protected = torch.arange(101) == 3

    def mask(device: str) -> Tensor:
        tensors = [tensor.to(device) for tensor in (input_ids, sample_ids, protected)]
        options = {"mask_token_id": 999, "mask_ratio": 0.15, "seed": seed, "step": step, "span_len": span_len}
        return mask_inputs(*tensors[:2], protected=tensors[2], **options)[0].cpu()

    assert (mask("cpu") == 999).sum() == 16 * 614
    assert torch.equal(mask(device), mask("cpu"))


@pytest.mark.parametrize("span_len", [pytest.param(span_len, marks=on_gpu) for span_len in (1, 3)])
def test_masking_never_waits_for_the_device(span_len: int) -> None:
    input_ids = torch.zeros(4, 4096, dtype=torch.int64, device="cuda")
    sample_ids = torch.arange(4, device="cuda")
    protected = torch.zeros(101, dtype=torch.bool, device="cuda")
    options = {"mask_token_id": 1, "mask_ratio": 0.15, "seed": 0, "step": 0, "span_len": span_len}
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask_inputs(input_ids, sample_ids, protected=protected, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
