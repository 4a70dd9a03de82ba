"""PyTorch's compiler around a plain decoder.

On a GPU: ``max-autotune``, and the whole step in one CUDA graph that is captured by hand and replayed per token. On a
CPU: weights frozen into the compiled program (inductor's freezing), in huge pages where the system grants them.
"""

from __future__ import annotations

import os
import time
from typing import Any

from peers.work import Missing, Work, dense_twin, on_gpu

_MODE = "max-autotune-no-cudagraphs"


class TorchCompiled:
    """The whole model compiled as one function."""

    by_layer = False

    def setup(self, work: Work) -> None:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages; PyTorch reads it when it first allocates
        try:
            import torch
        except ImportError:
            raise Missing("torch is not installed; pip install torch") from None
        from peers.torch_model import Decoder

        self.torch, self.work = torch, work
        gpu = on_gpu()
        if gpu and not torch.cuda.is_available():
            raise Missing("this torch sees no GPU; install one built for CUDA")
        if self.by_layer and not gpu:
            raise Missing("on a CPU weights are frozen into one program, so layers cannot share theirs; see torch")
        self.device = "cuda" if gpu else "cpu"
        torch.manual_seed(work.seed)
        torch.set_grad_enabled(False)
        model = Decoder(dense_twin(work.config), work.context, getattr(torch, work.dtype), self.device).eval()
        self.token = torch.ones(1, dtype=torch.int64, device=self.device)
        self.position = torch.full((1,), work.position, dtype=torch.int64, device=self.device)
        self.model = self._compiled(model)
        self.graph = None
        for _ in range(3):
            self._step()
        if gpu:
            self._capture()
        self.tokens_per_s(3)

    def _compiled(self, model: Any) -> Any:
        from torch._inductor import config

        if self.device == "cpu":
            config.freezing = True
            return self.torch.compile(model, fullgraph=True, dynamic=False)
        if not self.by_layer:
            return self.torch.compile(model, fullgraph=True, dynamic=False, mode=_MODE)
        for part in (*model.layers, model.head):
            part.compile(fullgraph=True, dynamic=False, mode=_MODE)
        return model

    def _step(self) -> None:
        self.token.copy_(self.model(self.token, self.position)[1])
        self.position.add_(1)

    def _capture(self) -> None:
        torch = self.torch
        torch.cuda.synchronize()
        self.position.fill_(self.work.position)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def tokens_per_s(self, tokens: int) -> float:
        once = self._step if self.graph is None else self.graph.replay
        self.position.fill_(self.work.positions(tokens).start)
        self._wait()
        started = time.perf_counter()
        for _ in range(tokens):
            once()
        self._wait()
        return tokens / (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        how = "frozen weights" if self.device == "cpu" else f"{_MODE}, one CUDA graph per token"
        return {
            "torch_version": self.torch.__version__,
            "torch_device": self.torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "compiled": f"{'layer by layer' if self.by_layer else 'whole model'}, {how}",
            "model_differs": "" if self.work.config.lanes is None else "dense model of the same dimensions",
        }


class TorchCompiledByLayer(TorchCompiled):
    """One layer compiled, and used for all: compiles in a fraction of the time."""

    by_layer = True
