import pytest
import torch

from meap_lit.errors import UserError
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.modules import AdamW

TOY = DecoderConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, hidden_size=8, intermediate_size=16, vocab_size=64, qkv_bias=True
)


def test_learning_rate_at_the_ends_and_corners():
    schedule = AdamW(lr=4e-4, final_lr=4e-5, warmup_share=0.1)
    lr = [schedule.lr * schedule.lr_factor(step, 100) for step in range(100)]
    assert lr[0] == pytest.approx(4e-5)  # a tenth of the way up after the first of ten steps
    assert lr[9] == lr[10] == pytest.approx(4e-4)
    assert lr[99] == pytest.approx(4e-5)
    assert (lr[54] + lr[55]) / 2 == pytest.approx((4e-4 + 4e-5) / 2)  # half-way down
    assert lr[:10] == sorted(lr[:10])
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert schedule.lr_factor(1000, 100) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak():
    assert AdamW(warmup_share=0.0).lr_factor(0, 100) == 1.0


def test_only_matrices_decay():
    model = Decoder(TOY)
    decayed, kept = AdamW(weight_decay=0.05).build(model).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_update_is_adamw():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    steps = (
        AdamW(lr=1e-2, final_lr=1e-3, weight_decay=0.1).build(ours),
        torch.optim.AdamW(theirs.parameters(), **options, fused=False),
    )
    for model, optimizer in zip((ours, theirs), steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_options_override_those_of_a_restored_state():
    model = Decoder(TOY)
    was = AdamW(lr=1e-3, betas=(0.5, 0.6), eps=1e-2, weight_decay=0.7).build(model)
    now = AdamW(lr=2e-3, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1)
    optimizer = now.build(model)
    expected = [{**group, "lr": 5e-4} for group in optimizer.param_groups]
    optimizer.load_state_dict(was.state_dict())
    assert optimizer.param_groups != expected
    now.set_options(optimizer, lr=5e-4)
    assert optimizer.param_groups == expected
    assert [group["weight_decay"] for group in expected] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"model.optimizer.lr must be in \(0, 1\], got 0"),
        ({"lr": 1e-4, "final_lr": 1e-3}, r"final_lr must be in \[0, model.optimizer.lr = 0.0001\], got 0.001"),
        ({"warmup_share": 2.0}, r"model.optimizer.warmup_share must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        AdamW(**values)
