"""The results store of this operator, and a new batch in it."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from edgevit import places
from edgevit.bench import new_id, now

if TYPE_CHECKING:
    from edgevit.results.store import Store


def open_store() -> Store:
    """The store at ``EDGEVIT_DB``, else the operator's own."""
    from edgevit.results.store import Store

    return Store(places.db_url())


def new_batch(store: Store, title: str) -> str:
    """A batch for one command; its id."""
    from edgevit.results.store import Batch

    batch = Batch(batch_id=new_id(), created_at=now(), title=title, command=shlex.join(["edgevit", *sys.argv[1:]]))
    store.add_batch(batch)
    return batch.batch_id
