"""One call through the stand-in, in a process of its own; prints what came of it as JSON.

one_call.py LIBRARY, with the settings of the stand-in in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_host.stand_in import Device, fake_ffi_call
from kernel.common import call_kernel, make_decoder, make_request
from tiny import tiny

from jax_mono.call import Mode


def main() -> None:
    device = Device(Path(sys.argv[1]))
    jax.ffi.ffi_call = fake_ffi_call(device)
    decoder = make_decoder(tiny("llama", num_layers=1))
    print("ready", flush=True)
    if os.environ.get("WAIT"):
        sys.stdin.readline()
    try:
        result = call_kernel(decoder, make_request(), mode=Mode.GENERATE, room=1)
        outcome = {"status": result.status.tolist(), "error": ""}
    except jax.errors.JaxRuntimeError as error:
        outcome = {"status": [], "error": str(error)}
    print(json.dumps(outcome | {"compiled": device.count("hiprtcCompileProgram")}))


if __name__ == "__main__":
    main()
