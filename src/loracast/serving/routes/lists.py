"""Lists as in OpenAI's API: what a client may ask of them, and how a page of them is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, Query

from loracast.serving.state import Paging

Cursor = Annotated[str | None, Query(max_length=80)]


def _paging(
    after: Cursor = None,
    before: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Paging:
    return Paging(after, before, limit, order)


Page = Annotated[Paging, Depends(_paging)]
"""The type of a route's argument that receives the part of a list that a client wants."""


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of objects that have ids."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
