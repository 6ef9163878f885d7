"""The formulas against what PyTorch holds: autograd's saved tensors, the optimizer's states, the peak of a process."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from meap_lit.errors import UserError
from meap_lit.model import Decoder, DecoderConfig, Documents, linear_cross_entropy
from meap_lit.model.lora import LoRA, add_lora
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.modules import AdamW
from meap_lit.planning.devices import Devices
from meap_lit.planning.memory import (
    Step,
    gathered_bytes,
    memory_of,
    optimizer_bytes,
    parameters_of,
    reduced_gradient_bytes,
    sharded_bytes,
)

TOY = DecoderConfig(
    num_layers=4, num_heads=4, num_kv_heads=2, hidden_size=64, intermediate_size=160, vocab_size=128, max_seq_len=128
)
ROWS, SEQ_LEN = 2, 128
TOY_STEP = Step(TOY, ROWS * SEQ_LEN, SEQ_LEN)


def toy_decoder(step: Step) -> Decoder:
    decoder = Decoder(step.decoder)
    if step.lora is not None:
        add_lora(decoder, step.lora)
    if step.precision == "bf16-true":  # as Lightning does, adapters included
        decoder.to(torch.bfloat16)
    if step.lora is not None:
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if "lora" in name:
                    parameter.fill_(0.01)
    return decoder


def autocast(precision: str):
    mixed = precision == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()


def saved_bytes(step: Step) -> int:
    """Bytes of the storages that autograd keeps of a decoder's forward, parameters and inputs aside, and its result."""
    decoder = toy_decoder(step)
    checkpoint_and_compile(decoder, step.activation_checkpointing, compile=False)
    input_ids = torch.randint(step.decoder.vocab_size, (ROWS, SEQ_LEN))
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*decoder.parameters(), input_ids)}
    storages = {}  # kept alive here, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            storages[storage.data_ptr()] = storage
        return tensor

    position_ids, documents = None, None
    if step.packed:
        position_ids = torch.arange(SEQ_LEN).repeat(ROWS, 1)
        documents = Documents.of_rows([[SEQ_LEN // 2], [SEQ_LEN]], SEQ_LEN)  # on a CPU others are padded
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(step.precision):
        hidden = decoder(input_ids, position_ids, documents)
    return sum(storage.nbytes() for storage in storages.values()) + hidden.nbytes


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ({}, {}),
        ({"tie_embeddings": True, "head_dim": 32, "num_kv_heads": 4}, {}),
        ({"qk_norm": True, "qkv_bias": True}, {}),
        ({}, {"packed": True}),
        ({}, {"activation_checkpointing": "full"}),
    ],
)
def test_activations_are_what_autograd_saves(decoder, options, precision):
    step = replace(TOY_STEP, decoder=replace(TOY, **decoder), precision=precision, **options)
    memory = memory_of(step)
    assert memory.activations + memory.copies == pytest.approx(saved_bytes(step), rel=0.002)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "gate_proj", "down_proj"]])
def test_activations_with_adapters_are_what_autograd_saves(targets, dropout, precision):
    step = replace(TOY_STEP, lora=LoRA(rank=8, targets=targets, dropout=dropout), precision=precision)
    memory = memory_of(step)
    assert memory.activations + memory.copies == pytest.approx(saved_bytes(step), rel=0.002)


def test_selective_checkpointing_keeps_the_results_of_products_and_attention():
    # 256 tokens: input 64 x 4 B; q 64, k and v 32 each, o 64, gate and up 160 each, down 64, attention 64, at 2 B;
    # the logsumexp of 4 heads at 4 B
    step = replace(TOY_STEP, activation_checkpointing="selective")
    one_more = replace(step, decoder=replace(TOY, num_layers=TOY.num_layers + 1))
    one_layer = memory_of(one_more).activations - memory_of(step).activations
    assert one_layer == 256 * (64 * 4 + (64 + 32 + 32 + 64 + 160 + 160 + 64 + 64) * 2 + 4 * 4)


def test_tensor_parallelism_divides_what_the_heads_and_the_mlp_keep():
    whole, halved = (
        memory_of(replace(TOY_STEP, devices=Devices(number=2, tensor_parallel_size=size))).activations
        for size in (1, 2)
    )
    per_token = (2 * 64 + 2 * 32) * 2 + 4 * 4 + 3 * 160 * 2  # attention, logsumexp, SwiGLU
    assert whole - halved == TOY.num_layers * ROWS * SEQ_LEN * per_token / 2


# ---------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("options", [{}, {"lora": LoRA(rank=4)}, {"decoder": replace(TOY, tie_embeddings=True)}])
def test_parameters_gradients_and_optimizer_states_are_exact(options, precision):
    step = replace(TOY_STEP, precision=precision, **options)
    decoder = toy_decoder(step)
    optimizer = AdamW().build(decoder)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    memory = memory_of(step)
    assert memory.parameters == sum(p.nbytes for p in decoder.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in decoder.parameters() if p.grad is not None)
    assert memory.optimizer == sum(state.nbytes for state in states)


def test_shards_are_cut_along_the_first_dimension_and_rounded_up():
    parameters = [torch.empty(10, 3)]
    assert sharded_bytes(parameters, 4) == 3 * 3 * 4
    assert optimizer_bytes(parameters, 4) == 2 * 3 * 3 * 4 + 4


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_gathered_are_the_root_two_blocks_and_in_the_backward_the_gradient_of_one(tie_embeddings):
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64 + 2 * 64
    embedding = 128 * 64
    root = 64 + embedding * tie_embeddings
    devices = Devices(number=4, shard_size=4, fsdp=True)
    step = replace(TOY_STEP, decoder=replace(TOY, tie_embeddings=tie_embeddings), devices=devices)
    assert gathered_bytes(parameters_of(step), devices, 4) == 4 * (root + 2 * block)
    one = [p for name, p in parameters_of(step).items() if name.startswith("layers.3.")]
    assert reduced_gradient_bytes(one, devices) == (4 + 4 + 4 / 4) * block
    kept = replace(step, devices=replace(devices, reshard_after_forward=False, param_dtype=torch.bfloat16))
    assert gathered_bytes(parameters_of(kept), kept.devices, 4) == 2 * (64 + embedding + 4 * block)
    reduced_wide = replace(step, devices=replace(devices, param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    assert reduced_gradient_bytes(one, reduced_wide.devices) == (2 + 4 + 4 / 4) * block
    assert memory_of(kept).copies == 0, "weights are gathered in the dtype of the products"


@pytest.mark.parametrize(
    ("buckets", "accumulation", "apart"),
    [(None, 4, False), ("copy", 1, True), ("copy", 4, True), ("view", 1, False), ("view", 4, True)],
)
def test_ddps_buckets_lie_beside_gradients_that_accumulate(buckets, accumulation, apart):
    # measured over two processes: benchmarks/results/2026-11-24-cpu-sharding.md
    memory = memory_of(replace(TOY_STEP, accumulation=accumulation, devices=Devices(2, buckets=buckets)))
    assert memory.buckets == (memory.gradients if apart else 0)


def test_heads_that_do_not_divide_are_named():
    devices = Devices(8, shard_size=1, tensor_parallel_size=8, fsdp=True)
    with pytest.raises(UserError, match=r"decoder\.num_heads 4 cannot be divided among tensor_parallel_size 8"):
        memory_of(replace(TOY_STEP, devices=devices))


# ---------------------------------------------------------------------------------------------- a whole step


@pytest.mark.parametrize(("accumulation", "num_copies"), [(1, 0), (4, 1)])
def test_gradients_that_are_reduced_once_are_whole_until_then(accumulation, num_copies):
    devices = Devices(number=4, shard_size=4, fsdp=True, reduce_dtype=torch.float32)
    step = replace(TOY_STEP, accumulation=accumulation, devices=devices)
    once = replace(step, devices=replace(devices, reduce_each_micro_batch=False))
    numel = sum(p.numel() for p in parameters_of(step).values())
    assert memory_of(once).total - memory_of(step).total == 4 * numel * num_copies


def test_the_loss_does_not_grow_with_the_tokens_beyond_a_piece():
    step = replace(TOY_STEP, decoder=replace(TOY, vocab_size=2**20), num_tokens=2048)  # two pieces
    per_token = TOY.hidden_size * 2 + 4 + 8  # gradient of the hidden states, in bfloat16; loss, in float32; label
    assert memory_of(replace(step, num_tokens=4096)).loss - memory_of(step).loss == 2048 * per_token


def train(step: Step) -> None:
    """Two optimizer steps of two micro-batches, in Lightning's order: old gradients go after the first forward."""
    decoder = Decoder(step.decoder)
    optimizer = AdamW().build(decoder)
    for number in range(4):
        input_ids = torch.randint(step.decoder.vocab_size, (step.num_tokens // step.seq_len, step.seq_len))
        with autocast(step.precision):
            loss = linear_cross_entropy(decoder(input_ids), decoder.lm_head.weight, input_ids)[0] / input_ids.numel()
        if number % 2 == 0:
            optimizer.zero_grad()
        loss.backward()
        if number % 2:
            optimizer.step()


PEAK_STEP = Step(
    replace(TOY, num_layers=2, num_heads=8, hidden_size=512, intermediate_size=1408, vocab_size=8192, max_seq_len=512),
    num_tokens=1024,
    seq_len=512,
    precision="32-true",
)


def peak_bytes() -> int:
    # not ru_maxrss, which a process inherits from the one that started it
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.mark.slow
def test_the_total_is_the_peak_of_a_fresh_process():
    # by default glibc keeps freed tensors of up to 32 MiB in its heap, which is no need of the step
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    assert memory_of(PEAK_STEP).total == pytest.approx(int(result.stdout), rel=0.1)


if __name__ == "__main__":
    train(TOY_STEP)  # loads what any step needs
    before = peak_bytes()
    train(PEAK_STEP)
    print(peak_bytes() - before)
