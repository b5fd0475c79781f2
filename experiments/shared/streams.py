"""Standard output and standard error of a command: a stream that cannot be written does not end a run."""

import os
import sys
from typing import Any


def tolerate() -> None:
    """Makes the standard streams of this process leave out what they cannot write, such as on a full disk.

    Characters that a stream cannot encode, such as names of files that are not in UTF-8, are escaped. A stream that was
    closed before the process started writes nothing. A pipe of standard output whose reader has gone still raises
    BrokenPipeError, so that `command | head` ends.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _reserve(descriptor)
            stream = open(os.devnull, "w")
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream, ends=name == "stdout"))


class Tolerant:
    """A text stream that leaves out what `stream` cannot write.

    Args:
      stream: the stream.
      ends: whether a pipe without a reader raises BrokenPipeError.
    """

    def __init__(self, stream: Any, *, ends: bool = False):
        self._stream, self._ends = stream, ends

    def write(self, text: str) -> int:
        """Writes text, with escapes in place of characters that the stream cannot encode."""
        encoding = self._stream.encoding or "utf-8"
        self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Writes the text in memory."""
        self._try(self._stream.flush)

    def _try(self, call: Any) -> None:
        try:
            call()
        except BrokenPipeError:
            if self._ends:
                raise
        except OSError:
            pass  # A later call tries again, with the text that is still in memory.

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _reserve(descriptor: int) -> None:
    """Opens the null device under a closed descriptor. Else the next file would get the messages of C++ libraries."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
