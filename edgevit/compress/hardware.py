"""Where training runs: this machine's CPU, or its GPUs through ``accelerate``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from edgevit.errors import MissingExtra

if TYPE_CHECKING:
    import torch

CLIP = 1.0
"""Largest norm of all gradients together."""


class Cpu:
    """All threads that torch was given; bfloat16 products where the CPU has them (twice as fast, DeiT-Tiny on a Zen 4)."""

    rank = 0
    processes = 1

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        self.half = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

    def describe(self) -> str:
        import torch

        threads = torch.get_num_threads()
        return f"{threads} CPU thread{'s' if threads > 1 else ''} in {'bfloat16' if self.half else 'float32'}"

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        manager: AbstractContextManager[Any] = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half)
        return manager

    def prepare(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return module, optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, module: torch.nn.Module) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)

    def agreed(self, value: float) -> float:
        """The main process's ``value``, in every process."""
        return value

    def wait(self) -> None:
        """Until every process is here."""


class Accelerated:
    """One process of those that ``accelerate`` runs, each on its GPU, in mixed precision."""

    def __init__(self, cpu: bool = False) -> None:
        import torch

        precision = "no" if cpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        self._accelerator = import_accelerate().Accelerator(mixed_precision=precision, cpu=cpu)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes

    def describe(self) -> str:
        return f"{self.processes} × {self.device.type} in {self._accelerator.mixed_precision}"

    def autocast(self) -> AbstractContextManager[Any]:
        manager: AbstractContextManager[Any] = self._accelerator.autocast()
        return manager

    def prepare(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        prepared: tuple[Any, Any] = self._accelerator.prepare(module, optimizer)
        return prepared

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, module: torch.nn.Module) -> None:
        self._accelerator.clip_grad_norm_(module.parameters(), CLIP)

    def agreed(self, value: float) -> float:
        import torch
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor([value], dtype=torch.float64, device=self.device)).item())

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


Hardware = Cpu | Accelerated


def import_accelerate() -> Any:
    """The package, or :class:`MissingExtra`."""
    try:
        import accelerate
    except ModuleNotFoundError as e:
        if e.name != "accelerate":
            raise
        raise MissingExtra("accelerate (training on a GPU)", "train") from e
    return accelerate


def gpu_count() -> int:
    """GPUs that torch can use, asked without starting CUDA in this process, which would take memory from those that train."""
    import torch

    return int(torch.cuda.device_count())


def find_hardware() -> Hardware:
    """The GPU of this process where torch sees one, else the CPU. Raises :class:`MissingExtra` for a GPU without accelerate."""
    return Accelerated() if gpu_count() else Cpu()
