"""Other systems' methods on the library's own models, to be measured beside it. See README.md."""

from .loop import Peer, PeerResult
from .paper import PaperWay
from .recursive_rejection import RecursiveRejection

__all__ = ["PaperWay", "Peer", "PeerResult", "RecursiveRejection"]
