"""Ray itself, imported when it is needed."""

from __future__ import annotations

from typing import Any


def imported() -> Any:
    """The module ray, connected to a cluster: that of ``ray.init``, or one that Ray starts on this machine.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(f'latemax.ray needs Ray: pip install "latemax[ray]" ({error})') from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray
