"""From a model's outputs to classes with names and probabilities. Needs numpy."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

from device_agents.errors import Refused


def rank_classes(outputs: Any, names: Tuple[str, ...], top: int) -> List[List[Dict[str, Any]]]:
    """Logits, float32 (images, classes) → for each image its ``top`` likeliest classes: index, label (empty where there is no
    name), probability by softmax.

    Raises ``worker-failed`` where an output is not a number or infinite: the largest of a row with a NaN is the NaN.
    """
    import numpy as np

    bad = int((~np.isfinite(outputs)).any(axis=1).sum())
    if bad:
        raise Refused("worker-failed", "the outputs are not a number or infinite in {} of {} images".format(bad, len(outputs)))
    logits = outputs.astype(np.float64)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponents / exponents.sum(axis=1, keepdims=True)
    found = []
    for row in shares:
        best = [int(i) for i in np.argsort(-row, kind="stable")[:top]]
        found.append(
            [{"index": i, "label": names[i] if i < len(names) else "", "probability": round(float(row[i]), 6)} for i in best]
        )
    return found


def parse_label_names(data: bytes) -> Tuple[str, ...]:
    """The bundle's blob of class names, a JSON list. Raises ``blob-damaged``."""
    try:
        names = json.loads(data.decode("utf-8"))
    except ValueError as e:
        raise Refused("blob-damaged", "the class names are not a JSON list: {}".format(e)) from e
    return tuple(str(n) for n in names) if isinstance(names, list) else ()
