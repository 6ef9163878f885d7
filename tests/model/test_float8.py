"""Products in float8: torchao's emulation on the CPU against a rounding written here, and in whole runs."""

import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8 import _auto_filter_for_recipe
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.model import Decoder, DecoderConfig, float8
from meap_lit.model.decoder import Head
from meap_lit.model.float8 import use_float8
from meap_lit.model.lora import PROJECTIONS
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.modules import AdamW, MEAPPretraining, base
from meap_lit.parallel.strategies import Sharded
from meap_lit.planning.command import PlanCLI
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read
from tests.support.toy_module import fork

CPU = torch.device("cpu")
TOY = DecoderConfig(
    vocab_size=320, num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=32, intermediate_size=64, max_seq_len=64
)


@pytest.fixture(autouse=True)
def no_layer_is_small(monkeypatch):
    monkeypatch.setattr(float8, "SMALL", (0, 0))


def decoder(*, rounded=True, config=TOY):
    torch.manual_seed(0)
    model = Decoder(config)
    if rounded:
        use_float8(model, CPU, emulate=True)
    return model


def step(model, precision=torch.bfloat16):
    """Loss and gradients of one batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (2, 65), generator=generator).to(model.norm.weight.device)
    model.zero_grad()
    with torch.autocast(tokens.device.type, precision, enabled=precision is not torch.float32):
        logits = model.logits(model(tokens[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_step(one, other):
    assert one[0] == other[0]
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


# -------------------------------------------------------------------------------------------------- layers


def test_the_projections_of_the_blocks_are_replaced_and_parameters_stay():
    plain = decoder(rounded=False, config=replace(TOY, qkv_bias=True))
    before = dict(plain.named_parameters())
    use_float8(plain, CPU, emulate=True)
    replaced = [name for name, module in plain.named_modules() if isinstance(module, Float8Linear)]
    assert sorted(name.split(".")[-1] for name in replaced) == sorted(2 * PROJECTIONS)
    assert type(plain.lm_head) is Head
    after = dict(plain.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize(
    ("sizes", "small"),
    [
        ({"num_heads": 32, "num_kv_heads": 8, "hidden_size": 4096, "intermediate_size": 14336}, ["k_proj", "v_proj"]),
        ({"num_heads": 64, "num_kv_heads": 8, "hidden_size": 8192, "intermediate_size": 28672}, []),
        (
            {"num_heads": 12, "num_kv_heads": 2, "hidden_size": 768, "intermediate_size": 2048},
            [*PROJECTIONS[:4], "down_proj"],
        ),
    ],
)
def test_small_layers_are_left_out_as_torchao_does(sizes, small, monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        model = Decoder(DecoderConfig(vocab_size=320, num_layers=1, **sizes))
    chosen_by_torchao = _auto_filter_for_recipe("tensorwise", [])
    expected = {name for name, module in model.layers.named_modules() if chosen_by_torchao(module, name)}
    use_float8(model, CPU, emulate=True)
    replaced = {name for name, module in model.layers.named_modules() if isinstance(module, Float8Linear)}
    assert replaced == expected
    assert sorted(set(PROJECTIONS) - {name.split(".")[-1] for name in replaced}) == sorted(small)


def rounded(x, dtype):
    """`x` scaled so that its largest element is the largest of `dtype`, rounded, and scaled back."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def test_products_are_those_of_rounded_factors():
    layer = decoder().layers[0].self_attn.k_proj  # [16, 32]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 32, generator=generator, requires_grad=True)
    grad = torch.randn(3, 16, 16, generator=generator)
    y = layer(x)
    y.backward(grad)
    inputs, weight = rounded(x.detach(), torch.float8_e4m3fn), rounded(layer.weight.detach(), torch.float8_e4m3fn)
    gradient = rounded(grad, torch.float8_e5m2)
    torch.testing.assert_close(y, inputs @ weight.T)
    torch.testing.assert_close(x.grad, gradient @ weight)
    torch.testing.assert_close(layer.weight.grad, gradient.flatten(0, 1).T @ inputs.flatten(0, 1))
    assert not torch.allclose(y, x @ layer.weight.T, rtol=1e-3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_is_near_that_without(precision):
    """Rounding is off by at most 1/16 (e4m3) or 1/8 (e5m2) of an element, by a root mean square of some 0.03 and 0.06.
    A gradient of this model is behind about a dozen products whose errors are independent: 0.06 * sqrt(12) = 0.2.
    """
    loss, gradients = step(decoder(rounded=False), precision)
    near_loss, near_gradients = step(decoder(), precision)
    assert near_loss == pytest.approx(loss, rel=2e-3)
    assert near_loss != loss
    for name, gradient in gradients.items():
        error = float((near_gradients[name] - gradient).norm() / gradient.norm())
        assert 0.02 < error < 0.33, name
        assert near_gradients[name].dtype == torch.float32


# ------------------------------------------------------------------------- recomputation and compilation


class CountProducts(TorchDispatchMode):
    """Counts the matrix products of float8 factors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_product = func is torch.ops.aten.mm.default and isinstance(args[0], Float8TrainingTensor)
        self.count += is_product
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "num_repeated"), [("selective", 0), ("full", 7 * TOY.num_layers)])
def test_activation_checkpointing_changes_no_bit(mode, num_repeated):
    """`selective` repeats no product: those of float8 factors are among the results that it keeps."""
    again = decoder()
    checkpoint_and_compile(again, mode, compile=False)
    with CountProducts() as kept:
        expected = step(decoder())
    with CountProducts() as products:
        actual = step(again)
    assert_same_step(actual, expected)
    assert kept.count == 3 * 7 * TOY.num_layers
    assert products.count == kept.count + num_repeated


@pytest.mark.slow
def test_what_is_compiled_repeats_no_product_and_finds_no_scale_twice(monkeypatch):
    """Without emulation, up to the code generator: three products a layer, and no more maxima with `selective`."""
    operations = Counter()

    def count(graph, _):
        operations.update(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(float8, "_check_device", lambda device: None)
    maxima = {}
    for mode in ("none", "selective"):
        operations.clear()
        torch._dynamo.reset()
        with FakeTensorMode():
            model = Decoder(replace(TOY, num_layers=1))
            use_float8(model, CPU)
            checkpoint_and_compile(model, mode, compile=True)
            model(torch.zeros(2, 64, dtype=torch.int64)).sum().backward()
        assert operations[torch.ops.aten._scaled_mm.default] == 3 * 7
        maxima[mode] = operations[torch.ops.aten.max.default]
    assert 0 < maxima["selective"] <= maxima["none"]


@pytest.mark.slow
def test_a_block_compiles_as_a_whole():
    """Up to the code generator, whose output for a CPU says nothing about that for a GPU."""
    one_block = replace(TOY, num_layers=1)
    compiled = decoder(config=one_block)
    compiled.layers[0].compile(backend="aot_eager", fullgraph=True)
    loss, gradients = step(compiled)
    expected_loss, expected = step(decoder(config=one_block))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, gradient in gradients.items():
        assert float((expected[name] - gradient).norm() / gradient.norm()) < 0.01, name


# ---------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def emulated(monkeypatch):
    """Recipes with `model.float8` run on the CPU."""
    monkeypatch.setattr(base, "use_float8", partial(use_float8, emulate=True))


FLOAT8 = ["--model.float8", "true"]


def run(recipe, *overrides):
    return RecipeCLI.run(["fit", "--config", str(recipe), *overrides])


@pytest.mark.parametrize(("recipe", "num_steps", "lr"), [("toy_recipe", 8, 3e-2), ("toy_sft_recipe", 7, 1e-2)])
def test_a_model_learns_as_without(recipe, num_steps, lr, request, emulated):
    words = [str(request.getfixturevalue(recipe)), "--trainer.precision", "bf16-mixed", "--budget.max_steps"]
    words += [str(num_steps), "--budget.val_every_n_steps", str(num_steps), "--model.optimizer.lr", str(lr)]
    losses = [float(run(*words, *more).trainer.callback_metrics["val/loss"]) for more in ([], FLOAT8)]
    assert losses[0] < math.log(320) - 1, "the model has learned"
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_a_resume_may_turn_it_on_or_off(toy_recipe, tmp_path, emulated):
    def checkpoint(version, step):
        return tmp_path / "runs" / "toy" / f"version_{version}" / "checkpoints" / f"step={step}.ckpt"

    short = ["--budget.max_steps", "4", "--budget.val_every_n_steps", "4", "--checkpoint.every_n_steps", "2"]
    without = run(toy_recipe, *short)
    whole = run(toy_recipe, *short, *FLOAT8)
    resumed = run(toy_recipe, *short, *FLOAT8, "--ckpt_path", str(checkpoint(1, 2)))
    for name, weight in whole.model.decoder.state_dict().items():
        assert torch.equal(resumed.model.decoder.state_dict()[name], weight), name
    for path, words in ((checkpoint(1, 2), []), (checkpoint(0, 2), FLOAT8)):
        resumed = run(toy_recipe, *short, *words, "--ckpt_path", str(path))
        assert resumed.trainer.global_step == 4
        assert type(resumed.model.decoder.layers[0].mlp.up_proj) is (Float8Linear if words else nn.Linear)
    saved = [read(checkpoint(version, 4))["state_dict"] for version in (0, 1)]
    assert saved[0].keys() == saved[1].keys() == without.model.state_dict().keys()
    assert {value.dtype for value in saved[1].values()} == {torch.float32}


SHARDED = ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "2", "--data.micro_batch_size", "1"]


def test_fsdp_is_the_same_as_one_process(toy_recipe, tmp_path, emulated):
    words = [*FLOAT8, "--data.micro_batch_size", "1", "--budget.max_steps", "1"]  # later steps magnify the last bits
    alone = run(toy_recipe, *words).model.decoder.state_dict()
    words = [*SHARDED, *words]
    assert fork(lambda: sys.exit(main(["fit", "--config", str(toy_recipe), *words])), 2, timeout=60) == [0, 0]
    assert_near(open_source(tmp_path / "runs" / "toy" / "version_1"), alone)


def assert_near(source, expected):
    assert set(source.names()) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(source.read(name), weight, atol=5e-6, rtol=1e-4)


def test_all_large_weights_are_gathered_in_float8():
    model = Decoder(TOY)
    use_float8(model, CPU, all_gather=True, emulate=True)
    gathered = {name for name, weight in model.named_parameters() if hasattr(weight, "fsdp_pre_all_gather")}
    assert gathered == {name for name, _ in model.named_parameters() if name.split(".")[-2] in PROJECTIONS}


@pytest.mark.slow
def test_weights_may_be_gathered_in_float8(toy_recipe, tmp_path, emulated):
    """The first step is that of one process; a resume, with other ways to find a scale, ends with the same bits."""
    words = [*FLOAT8, "--data.micro_batch_size", "1", "--budget.max_steps"]
    alone = run(toy_recipe, *words, "1").model.decoder.state_dict()
    words = [*SHARDED, *words, "2", "--model.float8", "all_gather", "--checkpoint.every_n_steps", "1"]
    first = tmp_path / "runs" / "toy" / "version_1" / "checkpoints"
    for more in ([], ["--ckpt_path", str(first / "step=1.ckpt")]):
        command = ["fit", "--config", str(toy_recipe), *words, *more]
        assert fork(lambda: sys.exit(main(command)), 2, timeout=60) == [0, 0]  # noqa: B023
    assert_near(open_source(first / "step=1.ckpt"), alone)
    assert not [file for file in (first / "step=1.ckpt").iterdir() if b"torchao" in file.read_bytes()]
    whole, resumed = (read(tmp_path / "runs" / "toy" / f"version_{n}" / "checkpoints" / "step=2.ckpt") for n in (1, 2))
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name


@pytest.mark.slow
def test_a_plan_does_not_depend_on_it():
    arguments = ["--config", "recipes/pretrain/meap_1.1b.yaml", "--devices", "8"]
    assert PlanCLI.read([*arguments, *FLOAT8]).plan.memory == PlanCLI.read(arguments).plan.memory


# --------------------------------------------------------------------------------------------- wrong input


def test_a_cpu_is_refused(toy_recipe):
    message = r"model.float8 needs a GPU of compute capability 8.9 or newer \(Ada, Hopper, Blackwell\), got cpu; leave"
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *FLOAT8)


def test_a_model_of_small_layers_only_is_refused(toy_recipe, emulated, monkeypatch):
    monkeypatch.setattr(float8, "SMALL", (4096, 1024))
    message = (
        "model.float8 gains nothing: no layer of the blocks has more than 4096 inputs or 1024 outputs; leave it out"
    )
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *FLOAT8)


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match=r"8.9 or newer .*, got NVIDIA A100-SXM4-80GB of 8.0; leave it out"):
        use_float8(decoder(rounded=False), torch.device("cuda"))


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"model.float8 needs torchao \(.*\): pip install 'meap-lit\[float8\]'"):
        use_float8(decoder(rounded=False), CPU, emulate=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.decoder.hidden_size", "40"],
            "model.float8 needs multiples of 16, got decoder.hidden_size 40; change it or leave model.float8 out",
        ),
        (["--model.decoder.intermediate_size", "72"], "got decoder.intermediate_size 72; change it"),
        (["--model.decoder.num_heads", "4"], "got decoder.num_kv_heads x head width 8; change it"),
        (["--model.float8", "all_gather"], "all_gather needs sharded weights, such as with recipes/strategy/fsdp.yaml"),
        (["--model.lora.rank", "4"], "model.float8 cannot be combined with model.lora; leave one of the two out"),
        (
            ["--data.seq_len", "30", "--data.micro_batch_size", "4"],
            "micro-batches of a multiple of 16 tokens, got data.micro_batch_size 4 x data.seq_len 30; change one",
        ),
    ],
)
def test_what_does_not_go_with_it_is_said_in_one_line(toy_recipe, capsys, emulated, words, message):
    assert main(["fit", "--config", str(toy_recipe), *FLOAT8, *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "float8" in line]
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_tensor_parallelism_is_refused():
    module = MEAPPretraining(0.15, optimizer=AdamW(lr=1e-3), decoder=TOY, float8=True)
    data = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=64), longest_input=32)
    module.trainer = SimpleNamespace(strategy=Sharded(tensor_parallel_size=2), datamodule=data)
    message = "model.float8 cannot be combined with trainer.strategy.tensor_parallel_size 2; set that to 1 or leave"
    with pytest.raises(UserError, match=message):
        module.configure_model()
