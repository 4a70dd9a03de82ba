"""llama.cpp through llama-cpp-python, on a GGUF file with random weights.

Weights are read into memory of the process, not mapped from the file, which is removed as soon as they are loaded.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jax_mono import settings
from jax_mono.models.random_source import RandomSource
from jax_mono.models.source import WeightSource
from peers.work import Missing, Work, dense_twin, on_gpu

INSTALL = "pip install gguf, and CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"
INSTALL_GPU = "CMAKE_ARGS=-DGGML_CUDA=ON pip install --force-reinstall --no-cache-dir llama-cpp-python"
_ALL_LAYERS = -1


class LlamaCpp:
    """Decodes greedily: one token is evaluated, the largest of its logits is the next."""

    def setup(self, work: Work) -> None:
        self.load(work, RandomSource(dense_twin(work.config), work.seed))
        prompt = np.random.default_rng(work.seed).integers(0, self.config.vocab_size, work.position)
        self.model.eval(prompt.tolist())
        self.token = 1
        self.tokens_per_s(3)

    def load(self, work: Work, source: WeightSource) -> None:
        """Brings a dense model into llama.cpp, by way of a file."""
        try:
            import llama_cpp

            from peers import gguf_writer
        except ImportError as error:
            raise Missing(f"{error.name} is not installed; {INSTALL}") from None
        self.gpu = on_gpu()
        if self.gpu and not llama_cpp.llama_supports_gpu_offload():
            raise Missing(f"this llama.cpp is built without CUDA; {INSTALL_GPU}")
        self.library, self.work, self.config = llama_cpp, work, source.config
        gguf_writer.check(self.config)
        with tempfile.TemporaryDirectory(prefix="jax-mono-gguf-") as folder:
            needed, free = gguf_writer.file_size(self.config, work.dtype), shutil.disk_usage(folder).free
            if needed > 0.95 * free:
                raise Missing(
                    f"the GGUF file takes {needed / 1e9:.2f} GB and {tempfile.gettempdir()} has {free / 1e9:.2f} GB "
                    f"left; set TMPDIR to a directory with more"
                )
            path = Path(folder) / "model.gguf"
            gguf_writer.write_gguf(path, source, work.dtype)
            self.model = self._open(path)

    def _open(self, path: Path) -> Any:
        exact = self.work.dtype == "float32"  # flash attention computes in float16 on a CPU
        kv = self.library.GGML_TYPE_F32 if exact else self.library.GGML_TYPE_F16
        return self.library.Llama(
            str(path),
            n_gpu_layers=_ALL_LAYERS if self.gpu else 0,
            use_mmap=False,
            n_ctx=self.work.context,
            n_batch=self.work.context,
            n_threads=settings.cores(),
            n_threads_batch=settings.cores(),
            flash_attn=not exact,
            type_k=kv,
            type_v=kv,
            verbose=False,
        )

    def tokens_per_s(self, tokens: int) -> float:
        self.model.n_tokens = self.work.positions(tokens).start  # what follows is forgotten
        started = time.perf_counter()
        for _ in range(tokens):
            self.model.eval([self.token])
            self.token = int(self.logits().argmax())
        return tokens / (time.perf_counter() - started)

    def logits(self) -> np.ndarray[Any, Any]:
        """Of the last token that was evaluated, float32 [V]; valid until the next one is."""
        found = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(self.config.vocab_size,))

    def about(self) -> dict[str, Any]:
        where = "all layers on the GPU" if self.gpu else f"{settings.cores()} threads"
        differs = [] if self.work.config.lanes is None else ["dense model of the same dimensions"]
        if any(0 < window < self.work.context for window in self.config.sliding_windows):
            differs.append("attends to all positions in all layers")
        return {
            "llama_cpp_python_version": self.library.__version__,
            "llama_cpp_system": self.library.llama_print_system_info().decode().strip(),
            "compiled": f"{where}, {'F32' if self.work.dtype == 'float32' else 'flash attention, F16'} KV cache",
            "model_differs": ", ".join(differs),
        }
