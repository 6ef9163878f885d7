"""What a strategy in a recipe means for the devices."""

import pytest
import torch
from jsonargparse import Namespace

from meap_lit.errors import UserError
from meap_lit.layout import Layout, layout_of, precision

SHARDED = "meap_lit.strategies.Sharded"
SHARDED_DEFAULTS = {
    "shard_size": None,
    "tensor_parallel_size": 1,
    "reshard_after_forward": True,
    "param_dtype": None,
    "reduce_dtype": None,
}


def trainer(strategy="auto", given="32-true", **options) -> Namespace:
    if options or strategy == SHARDED:
        defaults = SHARDED_DEFAULTS if strategy == SHARDED else {}
        strategy = Namespace(class_path=strategy, init_args=Namespace(**{**defaults, **options}))
    return Namespace(strategy=strategy, devices="auto", num_nodes=1, precision=given)


@pytest.mark.parametrize(
    ("strategy", "options", "layout"),
    [
        ("auto", {}, Layout(16, gradient_buckets=True)),
        ("ddp", {}, Layout(16, gradient_buckets=True)),
        ("lightning.pytorch.strategies.DDPStrategy", {"gradient_as_bucket_view": True}, Layout(16)),
        (SHARDED, {}, Layout(16, shard_size=16, fsdp=True, reduce_dtype=torch.float32)),
        (SHARDED, {"shard_size": 8}, Layout(16, shard_size=8, fsdp=True, reduce_dtype=torch.float32)),
        (
            SHARDED,
            {"given": "bf16-mixed"},
            Layout(16, shard_size=16, fsdp=True, param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        ),
        (
            SHARDED,
            {"tensor_parallel_size": 2, "param_dtype": "bfloat16", "reduce_dtype": "float32"},
            Layout(
                16,
                shard_size=8,
                tensor_parallel_size=2,
                fsdp=True,
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
            ),
        ),
    ],
)
def test_strategies(strategy, options, layout):
    assert layout_of(trainer(strategy, **options), 8, 2) == layout


def test_one_device_needs_no_strategy_and_two_that_share_products_read_the_same():
    assert layout_of(trainer(), 1) == Layout()
    assert layout_of(trainer(SHARDED, tensor_parallel_size=2), 4).num_replicas == 2


@pytest.mark.parametrize(
    ("given", "name"), [(None, "32-true"), (32, "32-true"), ("bf16", "bf16-mixed"), ("bf16-true", "bf16-true")]
)
def test_precisions(given, name):
    assert precision(given) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 3}, "8 devices cannot be divided into groups of trainer.strategy.shard_size 3"),
        (
            {"tensor_parallel_size": 3},
            "8 devices of a node cannot be divided by trainer.strategy.tensor_parallel",
        ),
        ({"shard_size": 0}, "trainer.strategy.shard_size must be at least 1, got 0"),
    ],
)
def test_devices_that_do_not_divide_are_named(options, message):
    with pytest.raises(UserError) as error:
        layout_of(trainer(SHARDED, **options), 8)
    assert message in str(error.value)


def test_a_strategy_for_one_device_is_refused_on_several():
    with pytest.raises(UserError, match="SingleDeviceStrategy is for one device, not for 8"):
        layout_of(trainer("lightning.pytorch.strategies.SingleDeviceStrategy", device="cpu"), 8)
