"""A disk that is full."""

import resource
from contextlib import contextmanager


@contextmanager
def file_size_limit(size):
    """Inside the block, writing more than `size` bytes to a file fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
