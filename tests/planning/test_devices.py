"""What a strategy in a recipe means for the devices."""

from inspect import signature

import lightning as L
import pytest
import torch
import torch.distributed as dist
from jsonargparse import Namespace
from torch.testing._internal.distributed.fake_pg import FakeStore

from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig
from meap_lit.model.build import meta_decoder
from meap_lit.modules import AdamW, MEAPPretraining
from meap_lit.parallel.strategies import Sharded
from meap_lit.planning.devices import Devices, devices_of, precision
from meap_lit.planning.memory import Step, parameters_of, sharded_bytes

SHARDED = "meap_lit.parallel.strategies.Sharded"
SHARDED_DEFAULTS = {name: parameter.default for name, parameter in signature(Sharded).parameters.items()}


def trainer(strategy="auto", given="32-true", devices="auto", num_nodes=1, **options) -> Namespace:
    if options or strategy == SHARDED:
        defaults = SHARDED_DEFAULTS if strategy == SHARDED else {}
        strategy = Namespace(class_path=strategy, init_args=Namespace(**{**defaults, **options}))
    return Namespace(strategy=strategy, devices=devices, num_nodes=num_nodes, precision=given)


@pytest.mark.parametrize(
    ("strategy", "options", "devices"),
    [
        ("auto", {}, Devices(16, buckets="copy")),
        ("ddp", {}, Devices(16, buckets="copy")),
        ("lightning.pytorch.strategies.DDPStrategy", {"gradient_as_bucket_view": True}, Devices(16, buckets="view")),
        (SHARDED, {}, Devices(16, shard_size=16, fsdp=True, reduce_dtype=torch.float32)),
        (SHARDED, {"shard_size": 8}, Devices(16, shard_size=8, fsdp=True, reduce_dtype=torch.float32)),
        (
            SHARDED,
            {"given": "bf16-mixed"},
            Devices(16, shard_size=16, fsdp=True, param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        ),
        (
            SHARDED,
            {"tensor_parallel_size": 2, "param_dtype": "bfloat16", "reduce_dtype": "float32"},
            Devices(
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
def test_strategies(strategy, options, devices):
    assert devices_of(trainer(strategy, devices=8, num_nodes=2, **options)) == devices


# ------------------------------------------------------------------------- against what the strategy really does

LLAMA3 = {"num_kv_heads": 8, "vocab_size": 128_320}
LLAMA3_8B = DecoderConfig(num_layers=32, num_heads=32, hidden_size=4096, intermediate_size=14336, **LLAMA3)
LLAMA3_70B = DecoderConfig(num_layers=80, num_heads=64, hidden_size=8192, intermediate_size=28672, **LLAMA3)


@pytest.fixture
def first_rank_of():
    """A function that makes this process the first of so many, which are not there: collectives do nothing."""

    def start(num_devices: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=num_devices, store=FakeStore())

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("decoder", "nodes", "options"),
    [
        (LLAMA3_8B, 1, {}),
        (LLAMA3_8B, 64, {"shard_size": 8}),
        (LLAMA3_8B, 64, {}),  # 128,320 rows over 512 devices: rounded up
        (LLAMA3_70B, 8, {"tensor_parallel_size": 2}),
        (LLAMA3_70B, 64, {"shard_size": 64}),
        (LLAMA3_70B, 64, {"shard_size": 16, "tensor_parallel_size": 4}),
    ],
)
def test_a_large_model_is_split_as_planned(first_rank_of, decoder, nodes, options):
    first_rank_of(8 * nodes)
    trainer = L.Trainer(
        strategy=Sharded(**options),
        accelerator="cpu",
        devices=8,
        num_nodes=nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    strategy = trainer.strategy
    strategy.connect(MEAPPretraining(mask_ratio=0.15, optimizer=AdamW(), decoder=decoder))
    strategy.setup_environment()
    model = meta_decoder(decoder, torch.float32)  # no memory
    strategy.shard(model)
    devices = devices_of(sharded(devices=8, num_nodes=nodes, **options))
    assert strategy.distributed_sampler_kwargs == {"num_replicas": devices.num_replicas, "rank": 0}
    parameters = parameters_of(Step(decoder, num_tokens=1, seq_len=1, precision="32-true", devices=devices))
    assert sum(p.to_local().nbytes for p in model.parameters()) == sharded_bytes(
        parameters.values(), devices.shard_size
    )


def sharded(**options) -> Namespace:
    return trainer(SHARDED, **options)


# ---------------------------------------------------------------------------------------------- the rest


def test_one_device_needs_no_strategy_and_two_that_share_products_read_the_same():
    assert devices_of(trainer(devices=1)) == Devices()
    assert devices_of(trainer(SHARDED, devices=4, tensor_parallel_size=2)).num_replicas == 2


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
        devices_of(trainer(SHARDED, devices=8, **options))
    assert message in str(error.value)


def test_a_strategy_for_one_device_is_refused_on_several():
    with pytest.raises(UserError, match="SingleDeviceStrategy is for one device, not for 8"):
        devices_of(trainer("lightning.pytorch.strategies.SingleDeviceStrategy", devices=8, device="cpu"))
