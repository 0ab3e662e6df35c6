"""The process that holds the model: ``python -m rma_llama_cpp.engine``, told by one line of JSON on its input.

llama.cpp's server listens on a Unix socket (a loopback port where there are none) that wants a key. Once the model is
loaded, its address is written as a line to stdout. It ends with its parent, and on SIGTERM at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any

#: Variables by which llama.cpp could be made to show prompts, take another port, or look for models elsewhere.
NOT_FOR_LLAMA = ("LLAMA_", "AIP_", "HF_", "GGML_")
#: All layers; llama.cpp takes as many as there are.
ALL_LAYERS = 9999
#: Tokens of a prompt that are computed at once. Between two such batches llama.cpp looks whether to stop, so on slow
#: processors they are short; one text to be embedded has to fit into one.
CPU_BATCH, GPU_BATCH, MICRO_BATCH = 128, 2048, 512
#: llama.cpp's levels of logging: errors, warnings and what is told once of a model.
VERBOSITY = 3
#: How far the engine steps back behind its parent, which has little to do and should do it at once.
NICE = 3
#: Seconds llama.cpp lets a connection be silent.
SILENCE_S = 3600
#: Seconds between two comment lines on a stream that has nothing to say yet.
PING_S = 10
#: States of a slot kept to go back to, for models whose cache cannot be cut (sliding windows, recurrent ones).
CHECKPOINTS = 4
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Load the model and serve it until the parent is gone."""
    end_with_parent()
    # Its threads would keep the parent from noticing that a client left, where there are few processors.
    with contextlib.suppress(OSError, AttributeError):
        os.nice(NICE)
    for name in [name for name in os.environ if name.startswith(NOT_FOR_LLAMA)]:
        del os.environ[name]
    import xllamacpp

    try:
        server = xllamacpp.Server(parameters(xllamacpp, json.loads(sys.stdin.readline())))
    except RuntimeError:
        # Why is among the lines that llama.cpp has written; the exception says nothing of it.
        sys.exit(1)
    # llama.cpp has put handlers of its own here, which would leave this process standing.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()
    os._exit(0)


def end_with_parent() -> None:
    """Die when the parent does, also while llama.cpp loads and Python stands still (Linux)."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def parameters(library: Any, told: dict[str, Any]) -> Any:  # noqa: ANN401 - the library has no annotations
    """Return llama.cpp's parameters for what the parent told: everything off that reads, writes or shows more."""
    wanted = library.CommonParams()
    wanted.model.path, wanted.model_alias = told["file"], {told["model"]}
    wanted.hostnames, wanted.port, wanted.api_keys = [told["host"]], 0, [told["key"]]
    wanted.n_parallel, wanted.n_ctx = told["slots"], told["slots"] * told["context"]
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = told["threads"]
    wanted.cpuparams.poll = wanted.cpuparams_batch.poll = 0
    wanted.n_gpu_layers = ALL_LAYERS if told["gpu"] else 0
    wanted.embedding = told["embeddings"]
    wanted.cache_type_k = wanted.cache_type_v = getattr(library.ggml_type, f"GGML_TYPE_{told['kv_type'].upper()}")
    # What it takes is decided by who starts it, not by what happens to be free; and no second cache of 8 GiB.
    wanted.fit_params, wanted.cache_ram_mib, wanted.n_ctx_checkpoints = False, 0, CHECKPOINTS
    wanted.kv_unified = False
    batch = told["context"] if told["embeddings"] else GPU_BATCH if told["gpu"] else CPU_BATCH
    wanted.n_batch, wanted.n_ubatch = batch, batch if told["embeddings"] else min(batch, MICRO_BATCH)
    wanted.ui = wanted.ui_mcp_proxy = wanted.endpoint_props = wanted.endpoint_metrics = False
    wanted.models_autoload, wanted.offline, wanted.server_tools = False, True, []
    wanted.slot_save_path = wanted.media_path = wanted.public_path = wanted.path_prompts_log_dir = ""
    wanted.cors_origins, wanted.cors_credentials = "", False
    wanted.timeout_read = wanted.timeout_write = SILENCE_S
    wanted.sse_ping_interval, wanted.verbosity = PING_S, VERBOSITY
    return wanted


def gpu(library: Any) -> bool:  # noqa: ANN401 - the library has no annotations
    """Whether this build of llama.cpp can compute on a GPU that is here."""
    kinds = library.ggml_backend_dev_type
    names = ("GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU")
    wanted = {getattr(kinds, name) for name in names if hasattr(kinds, name)}
    return any(device["type"] in wanted for device in library.get_device_info())


if __name__ == "__main__":
    threading.current_thread().name = "engine"
    main()
