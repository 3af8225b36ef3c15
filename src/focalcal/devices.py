"""Where a training runs, and how exactly that computes."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

import torch  # noqa: E402


def device() -> torch.device:
    """cuda, mps or cpu, the first that is there; the environment variable FOCALCAL_DEVICE overrides.

    ValueError if that names what is not there.
    """
    wanted = os.environ.get("FOCALCAL_DEVICE", "auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    usable = [name for name, count in there.items() if count]
    if wanted == "auto":
        return torch.device(usable[0])
    kind, colon, number = wanted.partition(":")
    if kind not in usable or (colon and not (number.isdecimal() and int(number) < there[kind])):
        raise ValueError(
            f"FOCALCAL_DEVICE is '{wanted}', which PyTorch does not find here; use auto, {', '.join(usable)}. "
            "(If there is a GPU, compare the CUDA version that nvidia-smi shows with torch.version.cuda.)"
        )
    return torch.device(wanted)


def set_numerics(fast: bool, on: torch.device, threads: int | None) -> None:
    """Process-wide switches of PyTorch: deterministic float32, or TF32 and the fastest kernels; CPU threads."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not fast, fast
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast
    if on.type == "cuda":
        if on.index is not None:
            torch.cuda.set_device(on)  # streams and graphs are made on the current one
        torch.use_deterministic_algorithms(not fast, warn_only=True)
