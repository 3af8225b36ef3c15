"""Where a training runs, and how exactly that computes."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

import torch  # noqa: E402


def device() -> torch.device:
    """cuda, mps or cpu, the first that is there; the environment variable FOCALCAL_DEVICE overrides.

    ValueError if that names what is not there.
    """
    wanted = os.environ.get("FOCALCAL_DEVICE", "auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name, ok in there.items() if ok]
    if wanted == "auto":
        return torch.device(usable[0])
    if wanted.split(":")[0] not in usable:
        raise ValueError(
            f"FOCALCAL_DEVICE is '{wanted}', which this machine does not have; use auto, {', '.join(usable)}."
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
