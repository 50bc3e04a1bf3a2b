"""What CUDA graphs of training steps are made of: recording, replaying, and steps with fewer kernels.

engine/side_by_side.py says when a step is recorded.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Repeated:
    """Work that a GPU repeats by itself: recorded once, then replayed.

    A recording repeats the same kernels on the same memory, and whatever Python decided while it was made
    (weights of losses, the phase) is decided for as long as it lasts. So it lasts until `decided` changes.
    Before every recording the work runs as usual a few times: that makes what later steps find (momenta,
    sums, the choice of convolution algorithms).

    Args:
        capture: (function without arguments) -> (replay, what the function returned), e.g. cuda_capture().
    """

    usual = 3

    def __init__(self, capture: Callable) -> None:
        self.capture, self.decided, self.done = capture, None, 0
        self.replay = self.returned = None

    def __call__(self, work: Callable, decided=None, recordable: bool = True):
        if decided != self.decided:
            self.decided, self.done, self.replay = decided, 0, None
        self.done += 1
        if not recordable or self.done <= self.usual:
            return work()
        if self.replay is None:
            self.replay, self.returned = self.capture(work)
        self.replay()
        return self.returned


def cuda_capture(stream, generators: Iterable[torch.Generator], counters: Iterable[Tensor] = ()) -> Callable:
    """What Repeated records with on CUDA.

    Args:
        stream: where the work is recorded: the one on which its usual steps ran, since a gradient is added
            up on the stream that its parameter was first used on. None: one made for it.
        generators: those that the work draws from.
        counters: tensors on the host that the work moves (host_counters); every replay moves them as much.
    """
    counters = list(counters)

    def capture(work: Callable[[], object]) -> tuple[Callable, object]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        before = [counter.clone() for counter in counters]
        try:
            # thread_local: the thread that pins a folder's next images may go on meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
                returned = work()
            moved = [counter - start for counter, start in zip(counters, before)]
        finally:  # recording has run nothing on the device, so nothing has been counted either
            for counter, start in zip(counters, before):
                counter.copy_(start)

        def replay():
            graph.replay()
            if counters:
                torch._foreach_add_(counters, moved)

        return replay, returned

    return capture


def host_counters(net: nn.Module) -> list[Tensor]:
    """Move the batch norms' counts of batches to the host: on a GPU each is a kernel per step."""
    counters = []
    for module in net.modules():
        count = getattr(module, 'num_batches_tracked', None)
        # without a momentum Python reads the count: on the device that refuses a recording, as it must
        if isinstance(count, Tensor) and module.momentum is not None:
            module.num_batches_tracked = count.cpu()
            counters.append(module.num_batches_tracked)
    return counters


class CastTogether(torch.autograd.Function):
    """Tensors in another precision, in one kernel; so are their gradients on the way back."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # a layer that was not used keeps no gradient, rather than one of 0
        cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
        torch._foreach_copy_(cast, list(tensors))
        return tuple(cast)

    @staticmethod
    def backward(ctx, *gradients):
        given = [g for g in gradients if g is not None]
        cast = iter(CastTogether.apply(ctx.dtype, *given) if given else ())
        return None, *(None if g is None else next(cast) for g in gradients)


def cast_weights(net: nn.Module, dtype: torch.dtype, losses: Iterable[nn.Module] = ()) -> dict[str, Tensor]:
    """{name: weight} of the layers that autocast would cast one by one, for torch.func.functional_call.

    losses: those whose layers, which take no part in autocast, may belong to the network too (simkd).
    """
    exact = {layer for loss in losses for layer in loss.modules()}
    names = [
        f'{path}.{name}' if path else name
        for path, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in exact
        for name, weight in module.named_parameters(recurse=False)
        if weight.dtype == torch.float32
    ]
    return dict(zip(names, CastTogether.apply(dtype, *(net.get_parameter(name) for name in names))))
