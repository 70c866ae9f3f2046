"""What each exact rewrite gains, and all together, against the plain conversions of the same model, in one interleaved run.

    python benchmarks/rewrites.py [--weights F] [--format tflite|onnx|all] [--rounds 60] [--end-to-end]

All artifacts are int8-dynamic at batch 1, on one thread of this process; rounds go A B C A B C …, medians are quoted, as ratios
to the plain conversion: ``litert_torch`` + ``dynamic_wi8_afp32``, and ``torch.onnx.export`` + ``quantize_dynamic`` per channel.
Without weights the model has random ones: times are the same, answers mean nothing. ``--end-to-end``: from a JPEG in memory
to the five likeliest classes, pixels against normalisation in numpy.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, apply_step
from edgevit.compress.quantize import QuantizeConfig
from edgevit.export.readback import read_onnx
from edgevit.export.readback_tflite import read_tflite
from edgevit.export.runtime import prepare_input
from edgevit.golden import synthetic_images
from edgevit.model import LoadedModel, ModelSource, load_model
from edgevit.progress import Quiet
from edgevit.rewrite import REWRITES, apply_rewrites
from edgevit.torchsetup import import_timm, import_torch

WARMUP = 3


@dataclass(frozen=True)
class Contender:
    """One artifact, ready to run: ``feed`` makes its input of one uint8 image, ``call`` runs it."""

    name: str
    megabytes: float
    feed: Callable[[Any], Any]
    call: Callable[[Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--format", default="all", choices=("tflite", "onnx", "all"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--end-to-end", action="store_true")
    a = parser.parse_args()
    import_torch().set_num_threads(1)
    source = ModelSource(a.model, weights=a.weights) if a.weights else ModelSource(a.model, random_weights=True)
    model = load_model(source)
    pixels = synthetic_images(32, model.preprocessing)
    for format_ in ("tflite", "onnx") if a.format == "all" else (a.format,):
        with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
            compare(model, format_, pixels, a.rounds, Path(scratch), a.end_to_end)


def compare(model: LoadedModel, format_: str, pixels: Any, rounds: int, scratch: Path, end_to_end: bool) -> None:
    """Build and time everything of one format, and print the table."""
    state = apply_rewrites(Compressed(model.module, model.preprocessing, model.module), data(pixels), Quiet())
    fitting = [name for name, text in state.reports[-1].details.items() if text[0].isdigit()]
    plans = {"edgevit, no rewrite": (), **{name: (name,) for name in fitting}, "all rewrites": tuple(fitting)}
    contenders = [plain(model, format_, scratch)]
    for name, wanted in plans.items():
        print(f"building {format_}: {name}", file=sys.stderr, flush=True)
        contenders.append(ours(model, format_, name, wanted, pixels, scratch))
    print(f"\n{model.info.name}, {format_}, int8-dynamic, {rounds} rounds")
    print(f"{'artifact':24s} {'MB':>6s} {'p50 ms':>8s} {'× plain':>8s}")
    times = interleaved([functools.partial(c.call, c.feed(pixels[:1])) for c in contenders], rounds)
    for contender, ms in zip(contenders, times, strict=True):
        print(f"{contender.name:24s} {contender.megabytes:6.2f} {ms:8.2f} {times[0] / ms:8.2f}", flush=True)
    if end_to_end:
        jpeg = encoded(pixels[0])
        both = (contenders[0], contenders[-1])
        times = interleaved([functools.partial(top_five, c, jpeg, model.preprocessing) for c in both], rounds)
        print(f"\nJPEG in memory → top 5\n{'artifact':24s} {'':6s} {'p50 ms':>8s} {'× plain':>8s}")
        for contender, ms in zip(both, times, strict=True):
            print(f"{contender.name:24s} {'':6s} {ms:8.2f} {times[0] / ms:8.2f}", flush=True)


def data(pixels: Any) -> CalibrationData:
    return CalibrationData(pixels, None, real=False)


def ours(model: LoadedModel, format_: str, name: str, wanted: tuple[str, ...], pixels: Any, scratch: Path) -> Contender:
    """The artifact with the rewrites ``wanted`` alone, through edgevit's own exporter and read back."""
    off = tuple(one for one in REWRITES if one not in wanted)
    state = apply_rewrites(Compressed(model.module, model.preprocessing, model.module), data(pixels), Quiet(), off)
    context = StepContext(data(pixels), lambda: _no_training(), 8, scratch, Quiet(), (format_,))
    state = apply_step(state, QuantizeConfig(scheme="int8-dynamic"), context)
    module, spec = state.carried(format_)
    if format_ == "onnx":
        from edgevit.export import onnx

        float_file = onnx.export_float(module, state.preprocessing, 1)
        file = onnx.apply_spec(float_file, spec, module, pixels, state.preprocessing)
        read = read_onnx(file, float_file, spec, (onnx.IR_VERSION, onnx.OPSET))
    else:
        from edgevit.export import tflite

        float_file = tflite.export_float(module, state.preprocessing, 1)
        file = tflite.apply_spec(float_file, spec, module, pixels, state.preprocessing, Quiet())
        read = read_tflite(file, float_file, spec, module)

    def feed(image: Any) -> Any:
        return prepare_input(image, model.preprocessing, read.input)

    return Contender(name, len(file) / 1e6, feed, session(format_, file))


def _no_training() -> Any:
    raise SystemExit("nothing is trained here")


def plain(model: LoadedModel, format_: str, scratch: Path) -> Contender:
    """The usual tools' own conversion, with nothing of edgevit in it but the module."""
    torch, timm = import_torch(), import_timm()
    timm.layers.set_fused_attn(False)
    example = torch.zeros(1, 3, model.preprocessing.height, model.preprocessing.width)
    if format_ == "onnx":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        torch.onnx.export(model.module, (example,), str(scratch / "f.onnx"), dynamo=False, opset_version=17)
        out = scratch / "plain.onnx"
        quantize_dynamic(
            str(scratch / "f.onnx"),
            str(out),
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
    else:
        import litert_torch
        from ai_edge_quantizer import quantizer, recipe

        litert_torch.convert(model.module, (example,)).export(str(scratch / "f.tflite"))
        tool = quantizer.Quantizer(str(scratch / "f.tflite"))
        tool.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        out = scratch / "plain.tflite"
        out.write_bytes(bytes(tool.quantize().quantized_model))
    file = out.read_bytes()

    def feed(image: Any) -> Any:
        mean, std = (np.asarray(v, np.float32) for v in (model.preprocessing.mean, model.preprocessing.std))
        return np.ascontiguousarray(((image.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))

    return Contender("plain conversion", len(file) / 1e6, feed, session(format_, file))


def session(format_: str, file: bytes) -> Callable[[Any], Any]:
    """A function that runs the file on one thread."""
    if format_ == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        runner = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        name = runner.get_inputs()[0].name
        return lambda x: runner.run(None, {name: x})[0]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=file, num_threads=1)
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def call(x: Any) -> Any:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(sink)

    return call


def interleaved(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median milliseconds of each of ``calls``, run in turn."""
    samples: list[list[float]] = [[] for _ in calls]
    for k in range(rounds + WARMUP):
        for j, call in enumerate(calls):
            began = time.perf_counter_ns()
            call()
            if k >= WARMUP:
                samples[j].append((time.perf_counter_ns() - began) / 1e6)
    return [statistics.median(one) for one in samples]


def encoded(image: Any) -> bytes:
    """A 4:3 JPEG of twice the image's size."""
    from PIL import Image

    side = image.shape[0] * 2
    stream = io.BytesIO()
    Image.fromarray(image).resize((side * 4 // 3, side)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def top_five(contender: Contender, jpeg: bytes, shape: Preprocessing) -> list[int]:
    """Decode, resize, crop, feed, run, and the five likeliest classes."""
    from PIL import Image

    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = shape.resize_short / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - shape.width) // 2, (size[1] - shape.height) // 2
    pixels = np.asarray(picture.crop((left, top, left + shape.width, top + shape.height)))
    logits = np.asarray(contender.call(contender.feed(pixels[None]))).reshape(-1)
    return [int(i) for i in np.argsort(-logits)[:5]]


if __name__ == "__main__":
    main()
