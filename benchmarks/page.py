"""What every benchmark shares: its command line, and the page that it prints."""

import datetime
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from meap_lit.errors import UserError

if TYPE_CHECKING:
    from meap_lit.model import DecoderConfig


def main(benchmark: Callable[..., None]) -> None:
    """Run a benchmark with the options of the command line; wrong input ends in one line."""
    from jsonargparse import auto_cli

    try:
        auto_cli(benchmark, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")


def check_device(device: str) -> None:
    """Raise `UserError` if `device` is cuda and torch finds no CUDA device."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu")


def page(name: str, title: str, device: str, *, facts: Iterable[str], body: Iterable[str]) -> str:
    """Return a page in Markdown.

    Args:
        name: Module of the benchmark, for the command that it was run by.
        title: First line.
        device: Device that was measured, cpu or cuda.
        facts: What else decides the figures; entries of a list.
        body: Lines of the tables.
    """
    command = f"    python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".rstrip()
    listed = (f"- {fact}" for fact in (*environment(device), *facts))
    return "\n".join([f"# {title}", "", command, "", *listed, "", *body]).rstrip("\n") + "\n"


def publish(page: str, output: Path | None) -> None:
    """Print a page, and write it to `output` if that is given."""
    print(page)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page)


def about(config: "DecoderConfig") -> str:
    """Return the size of a model in words."""
    return (
        f"model: {config.num_parameters():,} parameters ({config.num_layers} layers, {config.num_heads} heads, "
        f"{config.num_kv_heads} key-value heads, {config.hidden_size} wide, {config.intermediate_size} MLP, "
        f"vocabulary {config.vocab_size:,})"
    )


@cache
def environment(device: str) -> list[str]:
    """Return date, hardware and versions, as they were at the first call."""
    import torch

    from meap_lit.provenance import processor

    facts = [f"date: {datetime.date.today()}", f"CPU: {processor()}, {torch.get_num_threads()} thread(s)"]
    if device == "cuda":
        facts.append(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return [*facts, f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"]
