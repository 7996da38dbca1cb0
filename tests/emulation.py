"""CUDA graphs without CUDA: what CudaGraph records, recorded and replayed on a CPU, operation by operation.

A replay runs the same operations on the same tensors as the recording, and nothing of the Python between them: what a
real graph would freeze stays frozen here, what it would not see is not seen, and what it could not read is refused.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}


def tensors(values) -> list:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def aliases(values):
    """The values with new tensors for the same memory, which keep their shapes when squeeze_ changes those there."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, values)


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    recorded = 0  # by all of them

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self) -> None:
        assert self.operations, "nothing was recorded"
        for function, inputs, outputs in self.operations:
            args, kwargs = aliases(inputs)
            results = tensors(function(*args, **kwargs))
            for output, result in zip(outputs, results):  # none where the operation writes to its arguments
                output.copy_(result)


class Recording(TorchDispatchMode):
    """Stands for torch.cuda.graph: nothing that is recorded has happened once it ends, and new memory holds nothing."""

    open = 0

    def __init__(self, graph: Graph, pool=None, stream=None):
        super().__init__()
        self.graph, self.before, self.made = graph, {}, []

    def __enter__(self):
        assert not Recording.open, "one capture inside another"
        assert not self.graph.operations, "recorded twice"
        Recording.open += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        Recording.open -= 1
        Graph.recorded += 1
        with torch.no_grad():
            made = {storage(x) for x in self.made}
            for x, value in self.before.values():
                if storage(x) not in made:
                    x.copy_(value)
            for x in self.made:
                if x.is_floating_point():
                    x.fill_(float("nan"))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"{function}: the host would read what has not been computed"
        assert torch.Tag.nondeterministic_seeded not in function.tags, f"{function}: noise is drawn outside of captures"
        kwargs = kwargs or {}
        given = {**dict(zip((argument.name for argument in function._schema.arguments), args)), **kwargs}
        changed = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        written = tensors([given.get(name) for name in changed])
        for x in written:
            self.before.setdefault((storage(x), x.storage_offset(), x.shape, x.stride()), (x.detach(), x.clone()))
        inputs = aliases((args, kwargs))
        result = function(*args, **kwargs)
        known = {storage(x) for x in tensors((args, kwargs))}
        new = [x for x in tensors(result) if storage(x) not in known]
        if written or new:  # a view of what is there needs no second look
            assert written or len(new) == len(tensors(result)), function
            self.graph.operations.append((function, inputs, [] if written else aliases(new)))
            self.made += [] if written else aliases(new)
        return result


@contextmanager
def emulated_graphs():
    """Within it, what calls for CUDA graphs gets these."""
    fakes = {"current_stream": lambda: None, "graph_pool_handle": lambda: None, "CUDAGraph": Graph, "graph": Recording}
    with mock.patch.multiple(torch.cuda, **fakes):
        yield
