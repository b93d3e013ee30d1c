"""Whether a module is still what its class says, so that its work may be done another way."""

from __future__ import annotations

from torch import nn


def is_as_made(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module does what its class, one of ``kinds``, does, watched by nobody."""
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__  # replaced on this module alone
        and not nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )
