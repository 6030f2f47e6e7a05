"""What differs between the HTTP clients that huggingface_hub has used."""

from __future__ import annotations

import importlib

import huggingface_hub


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's client raises where no answer comes: refused, cut, timed out."""
    session = huggingface_hub.get_session() if hasattr(huggingface_hub, "get_session") else None
    name = "requests" if session is None else type(session).__module__.split(".")[0]
    client = importlib.import_module(name)
    if hasattr(client, "TransportError"):  # httpx, httpx2
        return (client.TransportError,)
    return (client.exceptions.ConnectionError, client.exceptions.Timeout)
