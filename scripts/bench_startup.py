"""Measures the way from the start of a process to its first token, cold and warm.

    python scripts/bench_startup.py --model laneformer-2b
    python scripts/bench_startup.py --checkpoint path/to/model
    JAX_PLATFORMS=cpu python scripts/bench_startup.py --model tiny-laneformer

Without --checkpoint, random weights of --model are written to a temporary directory first, in Hugging Face's layout.
Two processes then do the same after each other: the first with empty caches of compiled programs, the second with those
that it left. Each prints a JSON object, times in seconds:

  import    from the start of the process until its packages are imported and JAX has its devices
  open      the checkpoint's configuration and the names of its tensors
  pack      reading all weights, and arranging them as tapes where they will be read
  compile   the first token of a prompt less `launch`: programs of XLA and the resident program
  launch    the first token of the same prompt once more
  total     from the start of the process to its first token: import + open + pack + compile + launch

The checkpoint has just been written or read, so the system may have it in memory; reading it from a disk comes on top.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jax_mono.cli import models, options
from jax_mono.processes import end_session

PROMPT_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="laneformer-2b", help="a preset or a configuration (laneformer-2b)")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, instead of random weights")
    options.add_dtype_option(parser)
    parser.add_argument("--context", type=options.count, default=512, help="positions of the KV cache (512)")
    parser.add_argument("--deadline", type=options.seconds, default=300.0, help="seconds per process (300)")
    parser.add_argument("--child", type=float, metavar="STARTED", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(start(arguments)), flush=True)
        return 0
    with checkpoint_of(arguments) as checkpoint, tempfile.TemporaryDirectory() as caches:
        for name in ("cold", "warm"):
            about = {"caches": name, "model": arguments.model, "dtype": arguments.dtype, "context": arguments.context}
            print(json.dumps(about | in_a_process(checkpoint, Path(caches), arguments)), flush=True)
    return 0


@contextlib.contextmanager
def checkpoint_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """The checkpoint that was named, or a temporary one of random weights."""
    if arguments.checkpoint:
        yield arguments.checkpoint
        return
    from jax_mono.models.hf import export_hf
    from jax_mono.models.random_source import RandomSource

    config = models.find_config(arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        export_hf(config, RandomSource(config), Path(directory), dtype=arguments.dtype)
        yield Path(directory)


def in_a_process(checkpoint: Path, caches: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Starts once, in a process that is ended with all that it has started when its time is over."""
    command = [sys.executable, __file__, "--checkpoint", checkpoint, "--model", arguments.model]
    command += ["--dtype", arguments.dtype, "--context", str(arguments.context), "--child", str(time.time())]
    environment = os.environ | {
        "JAX_MONO_CACHE": str(caches / "programs"),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "xla"),
    }
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        out, _ = child.communicate(timeout=arguments.deadline)
    except subprocess.TimeoutExpired:
        return {"failed": f"no first token within {arguments.deadline:g} s; raise --deadline"}
    finally:
        end_session(child)
    return json.loads(out.splitlines()[-1]) if child.returncode == 0 else {"failed": f"ended with {child.returncode}"}


def start(arguments: argparse.Namespace) -> dict[str, object]:
    """Loads, packs and decodes a token in this process."""
    import jax

    from jax_mono.checkpoint import open_checkpoint
    from jax_mono.decoder import Decoder

    times = {}
    device = jax.devices()[0]
    now = time.time()
    times["import_s"] = now - arguments.child

    def lap(name: str) -> None:
        nonlocal now
        now, begun = time.time(), now
        times[f"{name}_s"] = now - begun

    source = open_checkpoint(arguments.checkpoint)
    lap("open")
    decoder = Decoder.from_source(source, dtype=arguments.dtype, context=arguments.context)
    jax.block_until_ready(decoder.tapes)
    lap("pack")
    prompt = list(range(PROMPT_TOKENS))
    decoder.generate(prompt, max_new_tokens=1, stop=[])
    lap("compile")
    decoder.generate(prompt, max_new_tokens=1, stop=[])
    lap("launch")
    total = sum(times.values()) - times["launch_s"]
    times["compile_s"] -= times["launch_s"]
    return {
        "device": device.device_kind,
        "weights_bytes": decoder.tapes.nbytes,
        **{name: round(seconds, 3) for name, seconds in times.items()},
        "total_s": round(total, 3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
