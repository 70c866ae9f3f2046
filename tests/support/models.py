"""Small real models for tests: a Vision Transformer of timm's own class, and factories that deliver nonsense."""

from __future__ import annotations

from typing import Any

from edgevit.torchsetup import import_timm, import_torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny_vit(
    num_classes: int = 10, img_size: int = 32, seed: int = 0, depth: int = 2, width: int = 48, global_pool: str = "avg"
) -> Any:
    """A ViT of two blocks at 32 pixels; its weights are scaled up so that its logits tell images apart."""
    torch = import_torch()
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=img_size,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=3,
        num_classes=num_classes,
        global_pool=global_pool,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                parameter.normal_(0, 1.6 / parameter[0].numel() ** 0.5)
    model.default_cfg = model.pretrained_cfg = {
        "input_size": (3, img_size, img_size),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }
    return model


def bare_vit(num_classes: int = 10) -> Any:
    """The same without a word on how images are prepared."""
    model = tiny_vit(num_classes)
    del model.default_cfg, model.pretrained_cfg
    return model


def hybrid(num_classes: int = 10) -> Any:
    """A padded convolution stem, a depthwise convolution and a linear head: no transformer at all."""
    torch = import_torch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.GELU(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
        torch.nn.GELU(),
        torch.nn.Conv2d(16, 32, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, num_classes),
    )
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
    return model


def no_linear(num_classes: int = 10) -> Any:
    """One convolution and a mean: nothing that dynamic int8 could quantize."""
    torch = import_torch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, num_classes, 4, stride=4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
    return model


def returns_text() -> str:
    return "not a module"


def _returning(forward: Any) -> Any:
    torch = import_torch()

    class Odd(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}

        def forward(self, x: Any) -> Any:
            return forward(x)

    return Odd()


def returns_tuple_module() -> Any:
    return _returning(lambda x: (x.mean(), x))


def returns_dict_module() -> Any:
    return _returning(lambda x: {"logits": x.flatten(1)[:, :10], "aux": None})


def returns_tokens_module() -> Any:
    """Features of every token, as a model without a head gives them."""
    return _returning(lambda x: x.flatten(1)[:, : 17 * 48].reshape(-1, 17, 48))


def decides_by_values() -> Any:
    """One of two heads, by whether the image is bright."""
    torch = import_torch()

    class Deciding(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.light, self.dark = torch.nn.Linear(3 * 32 * 32, 10), torch.nn.Linear(3 * 32 * 32, 10)
            self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}

        def forward(self, x: Any) -> Any:
            if x.mean() > 0:
                return self.light(x.flatten(1))
            return self.dark(x.flatten(1))

    return Deciding()


def unknown_operator() -> Any:
    """A QR decomposition, which ONNX does not have."""
    torch = import_torch()
    return _returning(lambda x: torch.linalg.qr(x[:, 0])[1][:, 0])


def raises() -> Any:
    raise RuntimeError("the moon is full")
