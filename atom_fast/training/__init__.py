"""Training of networks on labelled images: by a protocol, several at a time."""

import typing as _typing

from atom_fast._lazy import lazy_names as _lazy_names

if _typing.TYPE_CHECKING:
    from atom_fast.training.protocols import PROTOCOLS, Protocol, get_protocol

__all__ = ["PROTOCOLS", "Protocol", "get_protocol"]

__getattr__, __dir__ = _lazy_names(__name__, dict.fromkeys(__all__, "protocols"))
