import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from meap_lit.evaluation.attention.weights import attention_weights, read, weight_blocks
from meap_lit.inference.language_model import LanguageModel
from meap_lit.model import Decoder, DecoderConfig


@pytest.fixture(scope="module")
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


def all_weights(decoder, input_ids, block_size):
    """Weights of every layer, [L, H, T, T], put together from blocks."""
    layers = {}

    def observe(layer, query, key):
        size = query.size(1)
        rows = [
            torch.nn.functional.pad(block, (0, size - block.size(2))) for block in weight_blocks(query, key, block_size)
        ]
        layers[layer] = torch.cat(rows, dim=1)

    read(decoder, input_ids, observe)
    assert list(layers) == list(range(len(decoder.layers)))
    return torch.stack(list(layers.values()))


@pytest.mark.parametrize("block_size", [1, 7, 50, 1000])
def test_weights_are_those_of_transformers(model, source_folder, block_size):
    input_ids = torch.randint(320, (50,), generator=torch.Generator().manual_seed(0))
    eager = LlamaForCausalLM.from_pretrained(source_folder, attn_implementation="eager")
    with torch.no_grad():
        wanted = torch.cat(eager(input_ids[None], output_attentions=True).attentions)  # [L, H, T, T]
    found = all_weights(model.decoder, input_ids, block_size)
    assert found.std() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_weights_of_the_last_queries_by_the_definition():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    weights = attention_weights(query, key)
    assert weights.dtype == torch.float64
    for head in range(4):
        for row, position in enumerate((3, 4)):
            scores = [float(query[head, row] @ key[head // 2, j]) / math.sqrt(6) for j in range(position + 1)]
            total = sum(map(math.exp, scores))
            wanted = [math.exp(score) / total for score in scores] + [0.0] * (4 - position)
            assert weights[head, row].tolist() == pytest.approx(wanted, abs=1e-12)


def test_weights_are_float32_where_the_model_is_bfloat16():
    query = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    weights = attention_weights(query, torch.randn(1, 40, 8, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_the_decoder_reads_as_before_and_keeps_no_hook(model):
    decoder, input_ids = model.decoder, torch.arange(30)
    with torch.no_grad():
        before = decoder(input_ids[None])
    states = []
    handle = decoder.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    read(decoder, input_ids, lambda layer, query, key: None)
    handle.remove()
    assert torch.equal(states[0], before)

    def fail(layer, query, key):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        read(decoder, input_ids, fail)
    with torch.no_grad():
        assert torch.equal(decoder(input_ids[None]), before)  # `fail` is not called any more


class Largest(TorchDispatchMode):
    """The most elements that a tensor had which an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_is_larger_than_a_block():
    seq_len, num_heads, block_size = 2048, 2, 128
    config = DecoderConfig(
        num_layers=1, num_heads=num_heads, num_kv_heads=1, hidden_size=16, intermediate_size=16, vocab_size=64
    )
    num_queries = 0

    def observe(layer, query, key):
        nonlocal num_queries
        for weights in weight_blocks(query, key, block_size):
            num_queries += weights.size(1)

    decoder = Decoder(config)
    with Largest() as largest:
        read(decoder, torch.zeros(seq_len, dtype=torch.int64), observe)
    assert num_queries == seq_len
    assert largest.elements == num_heads * block_size * seq_len
