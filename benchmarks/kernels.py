"""Count the kernels of a program on fake tensors: their launches, bytes and FLOPs.

Eager: each dispatched operation that computes something is one kernel, which reads its arguments once and writes its
results once. Views, metadata and `empty` are none. An operation over a list of tensors (`foreach`, fused AdamW) is one.

Compiled: the graph of a block, forward and backward, is that of AOT autograd with inductor's decompositions and its
choice of what is recomputed. Each product and each attention is one kernel. The other operations between two of them
that are connected form one kernel, which reads its inputs once and writes once what is read outside of it. Inductor
makes at least as many: it ends a kernel where a sum over rows meets one over columns. What needs a reduction to one
number, such as the scale of a factor in float8, is a kernel of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention import varlen  # noqa: F401  (registers the operations)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1, aten._scaled_mm: 0}
"""Position of the first factor; the second is next."""
_ATTENTION = {
    aten._scaled_dot_product_flash_attention: (0, 4),
    aten._scaled_dot_product_flash_attention_backward: (1, 10),
    torch.ops.torch_attn._varlen_attn: (0, 4),
    torch.ops.torch_attn._varlen_attn_backward: (1, 10),
}
"""Position of the query, and FLOPs for each of its elements and each key that it sees: two products; five backward."""

_FREE = {aten._unsafe_view, aten._reshape_alias, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
_LOOK_UPS = {aten.embedding, aten.index, aten.gather, aten.nll_loss_forward}
"""Read of their first argument only as much as they return."""
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
"""Do not read their first argument."""


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Args:
        name: Operation, or some of those that are fused.
        bytes: Read and written.
        flops: Of products and attention; 0 for all else.
    """

    name: str
    bytes: int
    flops: int = 0


class CountKernels(TorchDispatchMode):
    """Collect the kernels that run, by the part of the program that `part` names.

    Args:
        keys_per_query: How many keys a token attends to, in the mean over all tokens.
    """

    def __init__(self, keys_per_query: float = 0.0) -> None:
        super().__init__()
        self.keys_per_query = keys_per_query
        self.part = ""
        self.kernels: dict[str, list[Kernel]] = {}
        self._paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # others keep the compiler from running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self.add([kernel_of(func, args, kwargs or {}, result, self.keys_per_query)])
        return result

    def add(self, kernels: Sequence[Kernel | None]) -> None:
        self.kernels.setdefault(self.part, []).extend(filter(None, kernels))

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def backend(self) -> Callable[..., Any]:
        """Return a backend for `torch.compile` that runs a graph as it is and counts its fused kernels each time."""

        def compile(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            kernels = fused_kernels(graph.graph, self.keys_per_query)

            def run(args: list[Any]) -> Any:
                if not self._paused:
                    self.add(kernels)
                with self.paused():
                    return graph(*args)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return aot_autograd(
            fw_compiler=compile,
            bw_compiler=compile,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )


# ------------------------------------------------------------------------------------------------- one operation


def kernel_of(func: Any, args: Any, kwargs: Any, result: Any, keys_per_query: float) -> Kernel | None:
    """Return the kernel of an operation of aten, or None if it has none."""
    packet = func.overloadpacket
    if _is_free(func):
        return None
    tensors = _tensors([args, {name: value for name, value in kwargs.items() if name != "out"}])
    written = _written(func, args, kwargs)
    results = [x for x in _tensors(result) if all(x is not other for other in (*tensors, *written))]
    if not written and not results:
        return None
    read, written_bytes = sum(map(_nbytes, tensors)), sum(map(_nbytes, [*written, *results]))
    if packet in _LOOK_UPS:
        read += _nbytes(results[0]) - _nbytes(tensors[0])
    elif packet in _OVERWRITES:
        read -= _nbytes(tensors[0])
    elif packet is aten.index_put_:  # touches as many elements as there are indices
        read, written_bytes = sum(map(_nbytes, tensors[1:])), _nbytes(tensors[1])
    elif packet is aten._fused_adamw_:  # declares gradients as written, for the case of a loss scale
        written_bytes -= sum(map(_nbytes, args[1]))
    return Kernel(str(packet).split(".")[-1], read + written_bytes, _flops(packet, args, keys_per_query))


def _is_free(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return func.overloadpacket in _FREE or any(not alias.is_write for alias in aliases)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    values = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
    mutable = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([values.get(name) for name in mutable])


def _flops(packet: Any, args: Any, keys_per_query: float) -> int:
    if packet in _ATTENTION:
        position, factor = _ATTENTION[packet]
        return round(factor * args[position].numel() * keys_per_query)
    if packet in _PRODUCTS:
        first, second = args[_PRODUCTS[packet] :][:2]
        return int(2 * first.numel() * second.size(-1))
    return 0


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested values, each once."""
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def _nbytes(x: Tensor) -> int:
    """Return the bytes of a tensor, in which an expanded dimension counts once."""
    elements = x.element_size()
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride or not size else 1
    return int(elements)


# ----------------------------------------------------------------------------------------------------- a graph


def fused_kernels(graph: fx.Graph, keys_per_query: float) -> list[Kernel]:
    """Return the kernels of a graph of AOT autograd after fusion; see the module's docstring.

    A product begins a new level, and a reduction to one number ends one. Every other operation is of the level of its
    first reader. Connected operations of one level are one kernel, so no kernel waits for itself.
    """
    source: dict[fx.Node, fx.Node] = {}  # what a view is a view of
    level: dict[fx.Node, int] = {}
    computed = []  # neither inputs, nor products, nor views
    kernels: list[Kernel] = []
    for node in graph.nodes:
        inputs = node.all_input_nodes
        level[node] = max((level[x] + _is_total(x) for x in inputs), default=0) + _is_product(node)
        source[node] = source[inputs[0]] if node.op == "call_function" and inputs and _is_view(node) else node
        if _is_product(node):
            args, kwargs = (tree_map_only(fx.Node, _value, x) for x in (node.args, node.kwargs))
            kernel = kernel_of(node.target, args, kwargs, _value(node), keys_per_query)
            kernels += [kernel] if kernel else []
        elif node.op == "call_function" and source[node] is node:
            computed.append(node)
    readers = {node: set(_readers(node, source)) for node in computed}
    for node in reversed(computed):
        after = [level[x] - _is_product(x) for x in readers[node] if x.op != "output"]
        level[node] = min(after) - _is_total(node) if after else level[node]
    group = {node: node for node in computed}  # leads to a representative of the kernel

    def root(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in computed:
        for reader in readers[node]:
            if reader in group and level[reader] == level[node]:
                group[root(node)] = root(reader)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in group:
        members.setdefault(root(node), []).append(node)
    for nodes in members.values():
        inside = set(nodes)
        read = {source[x] for node in nodes for x in node.all_input_nodes} - inside
        written = {x for x in nodes if readers[x] - inside}
        names = list(dict.fromkeys(str(node.target).split(".")[1] for node in nodes))
        nbytes = sum(_nbytes(x) for node in (*read, *written) for x in _tensors(_value(node)))
        kernels.append(Kernel("fused: " + " ".join(names), nbytes))
    return kernels


def _is_product(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _PRODUCTS or packet in _ATTENTION


def _is_total(node: fx.Node) -> bool:
    """Return whether a node reduces a tensor to one number."""
    sizes = [_value(x).numel() for x in (node, *node.all_input_nodes) if isinstance(_value(x), Tensor)]
    return node.op == "call_function" and sizes[:1] == [1] and max(sizes) > 1


def _is_view(node: fx.Node) -> bool:
    return not hasattr(node.target, "overloadpacket") or _is_free(node.target)  # without: operator.getitem


def _readers(node: fx.Node, source: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """Yield what reads a node, or a view of it."""
    for user in node.users:
        if source.get(user) is source[node]:
            yield from _readers(user, source)
        else:
            yield user


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")
